"""Plots about friends: sharing a treat, welcoming someone new, pulling together."""

from typing import NamedTuple

from ..grammar import GrammarContext
from ..words import FRIENDS, NAMES, Cast
from .plot import plot

TREATS = (
    *("strawberries", "apples", "cookies", "plums", "muffins"),
    *("pears", "honey cakes", "cherries", "pancakes", "raspberry buns"),
)

HUNGRY = (
    "I lost my lunch in the river",
    "I have walked all day without a bite",
    "My cupboard is empty",
    "I forgot to eat breakfast",
    "The birds ate all my bread",
    "I gave my lunch to my little brother",
)

WAYS_HOME = (
    ("dark clouds came, and it began to rain", "held a big leaf over them both"),
    ("thick fog came, and the path was gone", "knew the way and went in front"),
    ("it got dark, and the stars were hidden", "lit a small lantern"),
    ("they came to a river without a bridge", "found flat stones to step on"),
    ("a cold wind began to blow", "shared a warm woolly scarf"),
    ("a fallen tree lay across the path", "knew another way"),
)


@plot(
    lambda c: f"One morning, {c.hero.their} {c.carer.kind} gave {c.hero.name} a basket full of",
    lambda c: f"For a picnic, {c.hero.name} packed a basket with lots of",
    lambda c: f"On market day, {c.hero.name} got a big basket of",
    lambda c: f"At the fair, {c.hero.name} won a whole basket of",
)
def sharing(ctx: GrammarContext, cast: Cast) -> None:
    """A treat is shared with someone hungry, who then helps on the way home."""
    hero, carer, home = cast
    n = hero.name
    treats = ctx.choose(TREATS, lambda treats: f"{treats}.")
    ctx.emit(
        f"They smelled so good that {n} wanted them all.",
        f'"I will eat every one of them myself!" said {n}.',
        f"{n} wanted to eat them all alone.",
        f'"I will not give away a single one," {n} thought.',
    )
    ctx.start_paragraph()
    ctx.emit(
        f"{hero.They} was looking for a nice place to sit",
        f"{hero.They} was just going to take the first bite",
        f"{hero.They} was walking along with the basket",
        f"{hero.They} had just sat down in the grass",
    )
    friend = ctx.choose(FRIENDS, lambda friend: f"when {friend.full} came down the path.")
    f = friend.name
    ctx.choose(HUNGRY, lambda reason: f'"{reason}," {f} said.')
    ctx.emit(
        '"May I please have a little?"',
        f'"Could you give me some of your {treats}?"',
        '"Do you have something for me?"',
        '"I am so hungry!"',
    )
    ctx.start_paragraph()
    ctx.emit(
        f"{n} held the basket tight.",
        f"{n} looked at the basket and did not answer.",
        f"At first, {n} wanted to say no.",
        f"{n} pulled the basket a little closer.",
    )
    ctx.emit(
        f"But then {hero.they} saw {f}'s sad eyes.",
        f"But then {hero.they} heard {f}'s tummy rumble.",
        f"But {hero.they} knew how it feels to be hungry.",
        f"But {hero.they} could see that {f} was weak and tired.",
    )
    ctx.emit(
        f'"Here, half of them are for you," said {n}.',
        f'"Come and sit with me. We will share," said {n}.',
        f'"Take as many as you like," said {n}.',
        f'"There is enough for two," said {n}.',
    )
    ctx.emit(
        f"They ate in the grass, and {treats} had never tasted so good.",
        f"They ate {treats} under a tree and told each other jokes.",
        "They ate and laughed, and it was more fun than eating alone.",
    )
    ctx.start_paragraph()
    way, help_given = ctx.choose(WAYS_HOME, lambda way: f"On the way home, {way[0]}.")
    ctx.emit(
        f'"You helped me, and now I will help you," said {f}.',
        f'"Do not worry, friends help each other," said {f}.',
        f'"You were good to me. It is my turn," said {f}.',
    )
    ctx.emit(f"{f} {help_given}, and soon they were at {home.the}.")
    ctx.start_paragraph()
    ctx.emit(
        f'"Did you eat all the {treats}?" asked {hero.their} {carer.kind}.',
        f'"Where are all the {treats}?" {hero.their} {carer.kind} asked.',
        f'"Who ate all the {treats}?" asked {hero.their} {carer.kind}.',
    )
    ctx.emit(
        f'"I shared them with {f}," said {n}.',
        f'"{f} and I ate them together," said {n}.',
    )
    ctx.emit(
        f"{n} had given away some food and found a friend.",
        f"{n} learned that sharing makes everything taste better.",
        f"That is how {n} and {f} became friends.",
        f"{n} was happy, because a kind deed had come back.",
    )
    ctx.summarize(
        f"{n} shared {treats} with {friend.full}.",
        f"On the way home, {way}, and {f} {help_given}.",
    )


class Game(NamedTuple):
    """A game that goes wrong, and the newcomer's skill that saves it."""

    play: str
    trouble: str
    gift: str
    deed: str


GAMES = (
    Game(
        "playing ball",
        "The ball rolled into a deep, dark hole.",
        "I am good at digging",
        "dug and dug until the ball came out",
    ),
    Game(
        "flying kites",
        "The strings got into one big knot.",
        "I am good with knots",
        "pulled here and there until the knot was gone",
    ),
    Game(
        "building a tree house",
        "The nails were lost in the tall grass.",
        "I am good at finding things",
        "searched the grass until every nail was found",
    ),
    Game(
        "playing hide and seek",
        "Nobody could find the last one who hid.",
        "I am good at listening",
        "listened and heard a giggle behind the shed",
    ),
    Game(
        "putting on a show",
        "Nobody knew a song for the end.",
        "I am good at singing",
        "sang a song so lovely that everyone sang along",
    ),
    Game(
        "sailing toy boats",
        "The boats got stuck in the mud.",
        "I am good at making waves",
        "splashed and splashed until the boats were free",
    ),
    Game(
        "rolling hoops",
        "The best hoop broke in two.",
        "I am good at fixing things",
        "tied the hoop together so that it rolled again",
    ),
    Game(
        "building a sand castle",
        "The tower kept falling down.",
        "I am good at building",
        "mixed in some water, and the tower stood tall",
    ),
)


@plot(
    lambda c: f"One summer, someone new moved in next to {c.home.the}.",
    lambda c: f"One day, {c.hero.name} saw someone new in the park.",
    lambda c: f"One Sunday, a new neighbor came to live near {c.hero.name}.",
    lambda c: f"One warm afternoon, {c.hero.name} met a new neighbor.",
)
def newcomer(ctx: GrammarContext, cast: Cast) -> None:
    """Someone shy is asked to join a game, and saves it."""
    hero, carer, home = cast
    n = hero.name
    friend = ctx.choose(FRIENDS, lambda friend: f"It was {friend.a_kind}")
    f = friend.name
    ctx.emit(f"called {f}.", f"by the name of {f}.")
    ctx.emit(
        f"{f} was very shy and sat all alone.",
        f"{f} did not know anyone and looked at the ground.",
        f"{f} hid behind a fence and did not say a word.",
        f"{f} only looked on from far away.",
    )
    ctx.start_paragraph()
    game = ctx.choose(GAMES, lambda game: f"{n} was {game.play} with some friends.")
    ctx.emit(
        f'"Should we ask {f}?" said {n}.',
        f'"Look, {f} is watching us," said {n}.',
        f'"{f} has nobody to play with," said {n}.',
        f'"Let us ask {f} to play," said {n}.',
    )
    ctx.emit(
        '"No, we do not know the new one," said the others.',
        '"There are enough of us already," said the others.',
        '"Maybe some other time," said the others.',
        '"Why should we?" said the others.',
    )
    ctx.emit(
        f"{n} thought about how lonely that must feel.",
        f"{n} did not think that was kind.",
        f"{n} remembered being new once, too.",
        f"{n} felt sorry for {f}.",
    )
    ctx.emit(
        f'{hero.They} walked over to {f} and said, "Hello, I am {n}.',
        f'{hero.They} went to {f} and smiled. "My name is {n}.',
    )
    ctx.emit(
        'Do you want to play with us?"',
        'Come and join us!"',
        'We need one more."',
        'Will you be my friend?"',
    )
    ctx.emit(
        f"{f} nodded.",
        f"{f} smiled a tiny smile.",
        f'"Yes, please," {f} said in a very soft voice.',
        f"{f} came out slowly.",
    )
    ctx.start_paragraph()
    ctx.emit(
        "They had just begun when something went wrong.",
        "But soon there was a problem.",
        "But then the fun stopped.",
        "After a while, they had bad luck.",
    )
    ctx.emit(game.trouble)
    ctx.emit(
        f'"{game.gift}," said {f}.',
        f'"Let me try. {game.gift}," said the {friend.kind}.',
        f'"Wait, {game.gift}," said {f}.',
    )
    ctx.emit(f"And {f} {game.deed}.", f"Then {friend.they} {game.deed}.")
    ctx.start_paragraph()
    ctx.emit(
        f'"Hooray for {f}!" everyone shouted.',
        f'"You saved the day, {f}!" the others cheered.',
        f'"{f}, you are wonderful!" the others called.',
        f'"What would we do without {f}?" said the others.',
    )
    ctx.emit(
        f"{f} was not shy any more.",
        f"{f} laughed out loud for the first time.",
        f"From then on, {f} played with them every day.",
    )
    ctx.emit(
        f'That night, {n} told {hero.their} {carer.kind}, "I made a new friend today."',
        f'"You have a good heart," {hero.their} {carer.kind} told {n} that night.',
        f'"Today I made a friend, {carer.name}," {n} said back at {home.the}.',
    )
    ctx.emit(
        f"{n} knew that a friendly word can change everything.",
        f"{n} was glad that {hero.they} had said hello.",
        "Every friend was once someone new.",
    )
    ctx.summarize(
        f"{n} was {game.play} and asked {friend.full} to join.",
        f"The others did not want that, but {f} {game.deed}.",
        features=("Conflict",),
    )


ROOTS = ("turnip", "carrot", "beet", "radish", "potato", "leek", "parsnip", "sweet potato")

DISHES = ("soup", "stew", "pie", "salad")

STRONG = ("pony", "horse", "bear", "donkey", "pig", "sheep", "goat", "big dog")

TINY = ("mouse", "ladybug", "beetle", "snail", "cricket", "sparrow", "bumblebee", "caterpillar")


@plot(
    lambda c: f"One spring, {c.hero.name} and {c.hero.their} {c.carer.kind} planted a",
    lambda c: f"In the garden of {c.home.the}, there grew a",
    lambda c: f"Behind {c.home.the}, {c.hero.name} was growing a",
    lambda c: f"With much care, {c.hero.name} had planted a",
)
def giant_root(ctx: GrammarContext, cast: Cast) -> None:
    """A vegetable is too big to pull up until the smallest helper joins in."""
    hero, carer, home = cast
    n = hero.name
    root = ctx.choose(ROOTS, lambda root: f"{root}.")
    ctx.choose(
        ("table", "bed", "cart", "barrel", "sofa", "bathtub"),
        lambda size: f"It grew and grew until it was as big as a {size}.",
    )
    ctx.start_paragraph()
    dish = ctx.choose(DISHES, lambda dish: f'"Today we will make {root} {dish}," said')
    ctx.emit(
        f"{hero.their} {carer.kind} one morning.",
        f"{hero.their} {carer.kind} at last.",
        f"{hero.their} {carer.kind} with a smile.",
    )
    ctx.emit(
        f"{n} took hold of the {root} and pulled, but it did not move.",
        f"{n} ran outside and pulled at the {root}, but nothing happened.",
        f"{n} pulled at the {root}, but it stayed where it was.",
    )
    ctx.start_paragraph()
    strong = ctx.choose(STRONG, lambda strong: f"So they asked a {strong}")
    s = ctx.choose(NAMES, lambda name: f"named {name} to help.")
    ctx.emit(
        f"{s} pulled hard, but the {root} was stuck.",
        f"They pulled until they fell over, but the {root} was stuck.",
        f"The {strong} was strong, but the {root} was stuck.",
        f'"One, two, three!" called {n}, but the {root} was stuck.',
    )
    tiny = ctx.choose(TINY, lambda tiny: f'"May I help?" asked a tiny {tiny}.')
    ctx.emit(
        f'"You?" laughed {s}. "You are much too small!"',
        f'{s} only laughed. "What can a {tiny} do?"',
        f'"Go away, little one," said {s}. "This is hard work."',
        f'"Do not be silly," said {s}. "You are as small as a pea."',
    )
    ctx.emit(
        f'But {n} said, "Everyone can help."',
        f'But {n} said, "Please come. We need you."',
        f'"That is not nice, {s}," said {n}. "Of course you may help."',
        f'"We should all try together," said {n}.',
    )
    ctx.start_paragraph()
    ctx.emit(
        f"{n} pulled, {hero.their} {carer.kind} pulled, {s} pulled, and the {tiny} pulled.",
        f"{s} pulled, {n} pulled, {hero.their} {carer.kind} pulled, and the {tiny} pulled.",
    )
    ctx.emit(
        f"Pop! Out came the {root}!",
        f"Plop! The {root} flew out of the ground!",
        f"Whoops! The {root} came out, and they all fell on their backs!",
        f"At last, the {root} came out of the ground!",
    )
    ctx.emit(
        f'"I am sorry that I laughed," {s} told the {tiny}.',
        f'"Thank you, little {tiny}," said {s}. "I was wrong."',
        f'"You did it, little {tiny}!" said {s}.',
    )
    ctx.start_paragraph()
    ctx.emit(
        f"That evening, they all sat in {home.the} and ate {root} {dish}.",
        f"Soon there was {root} {dish} for everyone in {home.the}.",
        f"They took it to {home.the} and made the best {root} {dish} ever.",
    )
    ctx.emit(
        f"The {tiny} got the very first bite.",
        f"The {tiny} got the best seat at the table.",
        f"{s} and the {tiny} sat side by side.",
        f"{s} shared a plate with the {tiny}.",
    )
    ctx.emit(
        f"{n} had learned that nobody is too small to help.",
        f"{n} knew that even a little help can be a big help.",
        f"And {n} said that working together is the best way to work.",
    )
    ctx.summarize(
        f"{n} and {hero.their} {carer.kind} could not pull out a big {root}.",
        f"A {strong} named {s} could not do it, either.",
        f"Then a tiny {tiny} helped, and it came out.",
        features=("Twist",),
    )
