"""Plots at home: something breaks and is mended, a present is made, a promise is kept."""

from typing import NamedTuple

from ..grammar import GrammarContext
from ..words import COLORS, FRIENDS, Cast
from .plot import plot

FRAGILE = ("teapot", "vase", "bowl", "plate", "mug", "jug", "flower pot", "cookie jar")

WILD_GAMES = (
    *("throwing a ball", "spinning like a top", "jumping like a frog"),
    *("running in circles", "swinging a stick", "dancing like a bear"),
)

HIDING_PLACES = (
    *("under the bed", "behind the curtain", "in the toy box"),
    *("behind the stove", "in an old boot", "under the rug"),
)

PIECES = ("three", "four", "five", "six", "seven", "eight")


@plot(
    lambda c: f"On a shelf in the kitchen stood the thing {c.hero.their} {c.carer.kind} loved best:",
    lambda c: f"On the kitchen table stood {c.hero.their} {c.carer.kind}'s greatest treasure:",
    lambda c: f"In {c.home.the} there was something very old that nobody was allowed to touch:",
    lambda c: f"By the kitchen window stood something {c.hero.their} {c.carer.kind} loved very much:",
)
def broken(ctx: GrammarContext, cast: Cast) -> None:
    """A treasure is broken and hidden; the truth comes out, and it is mended together."""
    hero, carer, home = cast
    n = hero.name
    color = ctx.choose(COLORS, lambda color: f"a {color}")
    thing = ctx.choose(FRAGILE, lambda thing: f"{thing}.")
    ctx.start_paragraph()
    ctx.emit("One rainy day,", "One afternoon,", "While nobody was looking,", "One morning,")
    game = ctx.choose(WILD_GAMES, lambda game: f"{n} was {game} in the kitchen.")
    ctx.emit("Crash!", "Clink! Clank!", "Bump! Smash!", "Oops!")
    pieces = ctx.choose(
        PIECES, lambda pieces: f"The {color} {thing} fell down and broke into {pieces} pieces."
    )
    ctx.emit(
        f'"Oh no, what have I done?" whispered {n}.',
        f"{n} stood still and held {hero.their} breath.",
        f"{n} felt hot and cold at once.",
        f'"Nobody must know," thought {n}.',
    )
    place = ctx.choose(HIDING_PLACES, lambda place: f"Quickly, {hero.they} hid the pieces {place}.")
    ctx.start_paragraph()
    ctx.emit(
        f"All day long, {n} had a tummy ache.",
        f"At supper, {n} could not eat a bite.",
        f"{n} did not feel like playing any more.",
        f"That evening, {n} was very quiet.",
    )
    ctx.emit(
        f'"Have you seen my {thing}?" asked {hero.their} {carer.kind}.',
        f'"Where is my {thing}?" {hero.their} {carer.kind} asked.',
        f'"My {color} {thing} is gone!" said {hero.their} {carer.kind}.',
    )
    ctx.emit(
        f'"I broke it when I was {game}," said {n}.',
        f'"It was me, {carer.name}. I was {game}," said {n}.',
    )
    ctx.emit(
        f'"The pieces are {place}. I am so sorry."',
        f'"Then I hid the pieces {place}. Please do not be angry."',
        f'"I was scared and hid the pieces {place}."',
    )
    ctx.start_paragraph()
    ctx.emit(
        f'"I loved that {thing}, but I love you more," said {hero.their} {carer.kind}.',
        f'"Thank you for telling me the truth," said {hero.their} {carer.kind} and hugged {n}.',
        f'"It was brave of you to tell me," said {hero.their} {carer.kind} with a smile.',
    )
    ctx.emit(
        '"Let us mend it together."',
        '"Come, we will get the glue."',
        '"Now we will fix it, you and I."',
        '"We can glue it back together."',
    )
    ctx.start_paragraph()
    ctx.emit(
        f"{n} and {hero.their} {carer.kind} glued all {pieces} pieces together.",
        f"One by one, {n} helped to glue the {pieces} pieces.",
        f"{n} held the {pieces} pieces while the glue dried.",
    )
    ctx.emit(
        f"The {thing} had some cracks now, but it stood in its old place again.",
        f"The {color} {thing} did not look new, but it was loved even more.",
        f"They painted a tiny flower over every crack of the {color} {thing}.",
    )
    ctx.emit(
        f"After that, {n} only played wild games outside.",
        f"From then on, there was no more {game} in {home.the}.",
        f"{n} slept very well that night.",
        f"{n} had learned that telling the truth makes the heart light.",
        f"{n} knew that a mistake should not be hidden.",
        f"And {n} never hid a mistake again.",
    )
    ctx.summarize(
        f"{n} was {game} and broke a {color} {thing}.",
        f"{hero.They} hid the pieces {place}.",
        f"Then {hero.they} told {hero.their} {carer.kind} the truth, and they glued it together.",
    )


class Craft(NamedTuple):
    """A present made by hand, its material and the place where the hero finds it."""

    made: str
    stuff: str
    where: str
    use: str


CRAFTS = (
    Craft("necklace", "acorns", "under the oak tree", "put it on at once"),
    Craft("crown", "daisies", "in the meadow", "wore it all day"),
    Craft("picture", "dry leaves", "in the forest", "hung it over the bed"),
    Craft("bowl", "clay", "by the stream", "filled it with nuts"),
    Craft("lantern", "colored paper", "in an old box", "lit it that night"),
    Craft("pillow", "soft feathers", "near the hen house", "fell asleep on it that night"),
    Craft("bracelet", "shells", "on the beach", "never took it off"),
    Craft("wind chime", "shiny keys", "in a rusty tin", "hung it in the apple tree"),
)

SHOP_THINGS = (
    *("straw hat", "silk ribbon", "tea set", "toy bird"),
    *("silver clock", "silk scarf", "leather bag", "glass bird"),
    *("golden spoon", "velvet hat", "music box", "china doll"),
)

COINS = ("two", "three", "four", "five", "six", "seven")


@plot(
    lambda c: f"The next day was {c.hero.their} {c.carer.kind}'s birthday,",
    lambda c: f"It was almost the birthday of {c.hero.their} {c.carer.kind},",
    lambda c: f"{c.hero.Their} {c.carer.kind} had a birthday coming,",
    lambda c: f"Tomorrow would be {c.hero.their} {c.carer.kind}'s birthday,",
)
def present(ctx: GrammarContext, cast: Cast) -> None:
    """The hero makes a present that money cannot buy."""
    hero, carer, home = cast
    n = hero.name
    ctx.emit(
        f"and {n} wanted to find a lovely present.",
        f"but {n} had no present yet.",
        f"so {n} needed a present.",
    )
    coins = ctx.choose(COINS, lambda coins: f"In {hero.their} pocket there were only {coins} coins.")
    ctx.start_paragraph()
    ctx.emit(f"At the shop, {n} saw", f"In the window of the shop, {n} saw", f"In town, {n} saw")
    bought = ctx.choose(SHOP_THINGS, lambda bought: f"a beautiful {bought}.")
    ctx.choose(
        ("twenty", "thirty", "forty", "fifty", "a hundred"),
        lambda price: f'"It costs {price} coins," said the man in the shop.',
    )
    ctx.emit(
        f"{n} walked out with {hero.their} head down.",
        f"{n} put the {coins} coins away and left the shop.",
        f"{n} sat down on the step and sighed.",
        f"{n} could not help crying a little.",
    )
    ctx.start_paragraph()
    friend = ctx.choose(FRIENDS, lambda friend: f"Outside, {friend.full} was waiting.")
    f = friend.name
    ctx.emit(
        f'"I cannot buy the {bought}," said {n}.',
        f'"{coins.capitalize()} coins are not enough," said {n}.',
        f'"I will never find a present," said {n}.',
    )
    craft = ctx.choose(CRAFTS, lambda craft: f'"Then let us make a {craft.made}!" said {f}.')
    ctx.emit(
        f"They looked {craft.where} and came back with plenty of {craft.stuff}.",
        f"So they went to look {craft.where} and found enough {craft.stuff}.",
        f"Soon they found plenty of {craft.stuff} {craft.where}.",
    )
    ctx.emit(
        f"{n} went to work, and {f} told funny stories.",
        f"{n} worked until dark, and {f} helped with the tricky parts.",
        f'"It is looking better and better," said {f} while {n} worked.',
        f"{n} worked hard, and when it was done, {f} clapped.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f'In the morning, {n} called, "Happy birthday, {carer.name}!"',
        f'"Happy birthday, {carer.name}!" {n} sang in the morning.',
        f'"This is for you, {carer.name}!" {n} said on the great day.',
    )
    ctx.emit(
        f'"Did you make this {craft.made} for me?" {hero.their} {carer.kind} asked.',
        f'"A {craft.made} made of {craft.stuff}! I love it!" said {hero.their} {carer.kind}.',
        f'"This {craft.made} is better than any {bought}," said {hero.their} {carer.kind}.',
    )
    ctx.emit(
        f"{carer.They} hugged {n} and {craft.use}.",
        f"{carer.They} had happy tears in {carer.their} eyes and {craft.use}.",
        f"{carer.They} gave {n} a big kiss and {craft.use}.",
    )
    ctx.emit(
        f"They ate cake in {home.the}, and {f} got the biggest piece.",
        f"Then {f} came to {home.the}, and they all ate cake.",
    )
    ctx.emit(
        f"{n} had learned that the best presents come from the heart.",
        f"{n} still had {coins} coins and was the happiest of all.",
        f"And nobody thought of the {bought} any more.",
    )
    ctx.summarize(
        f"{n} wanted to buy a {bought} for {hero.their} {carer.kind}, but had only {coins} coins.",
        f"With {friend.full}, {hero.they} made a {craft.made} of {craft.stuff}.",
    )


class Chore(NamedTuple):
    """A promised task ("feed the hens"), its undone state and its completion."""

    do: str
    undone: str
    done: str


CHORES = (
    Chore("feed the hens", "The hens will be hungry", "the hens were eating happily"),
    Chore("water the roses", "The roses will be thirsty", "the roses stood up straight again"),
    Chore("pick the ripe cherries", "The birds will eat them all", "the cherries were in a bowl"),
    Chore("bring in the washing", "The washing will get wet", "the washing was dry and folded"),
    Chore("sweep the floor", "The floor will stay dirty", "the floor was as clean as a plate"),
    Chore("carry in the wood", "The house will be cold tonight", "the wood was in a tidy pile"),
    Chore("dust the shelves", "The shelves will be gray with dust", "the shelves were shiny"),
    Chore("make the beds", "The beds will be a mess", "every pillow was in its place"),
    Chore("fold the towels", "The towels will be in a heap", "the towels were in a neat pile"),
    Chore("wash the dishes", "There will be no clean plates", "every dish was on its shelf"),
)

OUTINGS = (
    ("fly kites on the hill", "flew kites on the hill"),
    ("swim in the lake", "swam in the lake"),
    ("catch fish at the river", "caught fish at the river"),
    ("play tag in the meadow", "played tag in the meadow"),
    ("see the puppet show in town", "saw the puppet show in town"),
    ("pick berries in the woods", "picked berries in the woods"),
    ("build a fort by the creek", "built a fort by the creek"),
    ("look for shells on the beach", "looked for shells on the beach"),
    ("slide down the hay in the barn", "slid down the hay in the barn"),
    ("watch the boats come in", "watched the boats come in"),
    ("roll down the grassy hill", "rolled down the grassy hill"),
    ("play hide and seek in the park", "played hide and seek in the park"),
)

ERRANDS = (
    *("go to the market", "visit a sick friend", "see the doctor"),
    *("mail a letter", "go to work", "take eggs to the baker", "help a neighbor", "buy flour"),
)


@plot(
    lambda c: f"One morning, {c.hero.their} {c.carer.kind} had to",
    lambda c: f"After lunch one day, {c.hero.their} {c.carer.kind} had to",
    lambda c: f"On Saturday, {c.hero.their} {c.carer.kind} had to",
    lambda c: f"One busy day, {c.hero.their} {c.carer.kind} had to",
)
def promise(ctx: GrammarContext, cast: Cast) -> None:
    """A promise is kept although something more fun comes along."""
    hero, carer, home = cast
    n = hero.name
    ctx.choose(ERRANDS, lambda errand: f"{errand}.")
    chore = ctx.choose(CHORES, lambda chore: f'"Will you {chore.do} while I am gone?"')
    ctx.emit(f"{carer.they} asked.", f"{carer.they} said at the door.")
    ctx.emit(
        f'"Yes, {carer.name}, I promise," said {n}.',
        f'"I promise, {carer.name}. You can trust me," said {n}.',
        f'"I will, {carer.name}. I promise," said {n}.',
    )
    ctx.start_paragraph()
    friend = ctx.choose(FRIENDS, lambda friend: f"Just then, {friend.full} knocked on the door.")
    f = friend.name
    outing, had_fun = ctx.choose(OUTINGS, lambda outing: f'"Come on, let us {outing[0]}!" said {f}.')
    ctx.emit(
        f'"I promised to {chore.do}," said {n}.',
        f'"No, first I have to {chore.do}," said {n}.',
    )
    ctx.emit(
        f'"Do it later! Nobody will know," said {f}.',
        f'"Can it not wait until tomorrow?" asked {f}.',
        f'"But the sun is shining now," said {f}.',
        f'"Oh, come on! Just this once," said {f}.',
    )
    ctx.start_paragraph()
    ctx.emit(
        f"{n} looked at the path and then at {home.the}.",
        "It was hard to say no to a friend.",
        f"{n} thought about it for a while.",
    )
    ctx.emit(
        f'"{chore.undone}," said {n}. "A promise is a promise."',
        f'"No. {chore.undone}, and I gave my word," said {n}.',
    )
    ctx.emit(
        f'"You are right. Then I will help you," said {f}.',
        f'"Two are faster than one. I will help," said {f}.',
        f'{f} nodded. "Then let us do it together."',
        f'"All right, show me how," said {f}.',
    )
    ctx.emit(f"Before long, {chore.done}.", f"In half the time, {chore.done}.", f"Soon {chore.done}.")
    ctx.start_paragraph()
    ctx.emit(
        f"Then {n} and {f} {had_fun} until the evening.",
        f"After that, they {had_fun}, and it was twice as much fun.",
        f"Now they were free, and they {had_fun}.",
    )
    ctx.emit(
        f'"I see you kept your promise," said {hero.their} {carer.kind} at supper.',
        f'"You kept your word," {hero.their} {carer.kind} said that night.',
        f'{hero.Their} {carer.kind} came home and said, "Thank you. I knew I could trust you."',
    )
    ctx.emit(
        f"{n} smiled, for that felt even better than playing.",
        f"{n} knew that fun is sweeter when the work is done.",
        f"And everyone knew that {n} could be trusted.",
        f"{n} was glad that {hero.they} had kept {hero.their} word.",
    )
    ctx.summarize(
        f"{n} promised to {chore.do}.",
        f"{friend.full} wanted to {outing}.",
        f"But {n} kept {hero.their} word, and they worked before they played.",
    )
