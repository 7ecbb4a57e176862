"""Plots about courage: a race against someone faster, a fear that is faced."""

from typing import NamedTuple

from ..grammar import GrammarContext
from ..words import FRIENDS, Cast, Character, he, she
from .plot import plot

RIVALS = (
    *(he("Dash", "hare"), she("Star", "horse"), he("Bolt", "dog"), she("Flick", "cat")),
    *(he("Rocket", "pony"), she("Zippy", "zebra"), he("Jet", "wolf"), she("Comet", "goose")),
    *(he("Buck", "deer"), she("Swift", "ostrich"), he("Duke", "rooster"), she("Viola", "goat")),
)

PAUSES = (
    ("sat down under a tree and fell asleep", "was still asleep"),
    ("stopped to eat blackberries from a bush", "was still eating berries"),
    ("stopped to look at the pretty face in a puddle", "was still looking in the puddle"),
    ("stopped to tell a crow about being so fast", "was still talking to the crow"),
    ("stopped to chase a yellow butterfly", "was still chasing the butterfly"),
    ("lay down in the sun to rest", "was still lying in the sun"),
    ("went to splash in a cool pond", "was still splashing"),
    ("sat down to take a pebble out of one shoe", "was still looking for the pebble"),
)

FINISHES = (
    *("the old bridge", "the tall windmill", "the big oak tree", "the white gate"),
    *("the castle", "the train station", "the town hall", "the lighthouse"),
    *("the stone well", "the village school", "the market square", "the red barn"),
)

PRIZES = (
    *("basket of peaches", "chocolate cake", "jar of honey", "big cherry pie", "bag of sweet buns"),
    *("box of candy", "golden cup", "shiny medal", "silver bell", "new red drum"),
)


@plot(
    lambda c: f"Every year there was a race from {c.home.the} to",
    lambda c: f"One day, {c.hero.name} heard about a race that went all the way to",
    lambda c: "It was the day of the great race to",
    lambda c: "Everyone was talking about the race to",
)
def race(ctx: GrammarContext, cast: Cast) -> None:
    """A fast rival stops on the way; the hero does not."""
    hero, carer, home = cast
    n = hero.name
    finish = ctx.choose(FINISHES, lambda finish: f"{finish}.")
    prize = ctx.choose(PRIZES, lambda prize: f"The winner would get a {prize}.")
    ctx.start_paragraph()
    rival: Character = ctx.choose(RIVALS, lambda rival: f"The fastest of all was {rival.full}.")
    r = rival.name
    ctx.emit(
        f'"Nobody is as fast as I am!" {r} told {n}.',
        f'"You will never win," {r} told {n}.',
        f'{r} laughed. "That {prize} is already mine!"',
        f'"Look at those short legs!" {r} said to {n}.',
    )
    advice = ctx.choose(
        ("Step by step", "Slow and steady", "Bit by bit", "Do not stop", "Just go on"),
        lambda advice: f'"{advice}, and you will get there," whispered {hero.their} {carer.kind}.',
    )
    ctx.start_paragraph()
    ctx.emit(
        f"A bell rang, and {r} shot away like an arrow.",
        f"A whistle blew, and {r} was soon far ahead.",
        f'"Ready, set, go!" In a moment, {r} was out of sight.',
        f"The race began, and {r} ran like the wind.",
    )
    stopped, still = ctx.choose(
        PAUSES,
        lambda pause: f'"I have lots of time," thought {r}, and {rival.they} {pause[0]}.',
    )
    ctx.emit(
        f'{n} was hot and tired, but {hero.they} kept on going. "{advice}," {hero.they} said.',
        f'"{advice}," {n} said again and again, and {hero.they} did not rest.',
        f'{n} ran and ran. "{advice}," {hero.they} told {hero.their} tired legs.',
    )
    ctx.emit(
        f"When {hero.they} passed by, {r} {still}.",
        f"Soon {hero.they} passed {r}, who {still}.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f"When {r} came to {finish}, it was too late.",
        f"{r} ran and ran to {finish}, but it was too late.",
        f"Only at {finish} did {r} see {hero.them} again.",
        f"{r} was the second one at {finish}.",
    )
    ctx.emit(
        f"{n} had won, and everyone clapped and gave {hero.them} the {prize}.",
        f"{n} was first! {hero.They} held up the {prize}, and everyone cheered.",
    )
    ctx.emit(
        f'"I am sorry I was mean," said {r}.',
        f'"You ran well. I am sorry I laughed at you," said {r}.',
        f'"You are the better one," said {r}.',
    )
    ctx.emit(
        f"Back at {home.the}, {n}'s {carer.kind} was very proud.",
        f"{n} had learned that going on is better than being fast.",
        f"{r} never laughed at anyone again.",
        f"After that, {n} and {r} often ran together.",
    )
    ctx.summarize(
        f"{n} ran a race to {finish} against {rival.full}, who {stopped}.",
        f"{n} went on and won the {prize}.",
        features=("Conflict",),
    )


class Fear(NamedTuple):
    """A fear, the reason to face it, the scary sign and its harmless cause."""

    of: str
    need: str
    sign: str
    truth: str


FEARS = (
    Fear(
        "the dark cellar",
        "needed a jar of honey from the cellar",
        "Something moved in the corner.",
        "It was only a tiny mouse with a crumb",
    ),
    Fear(
        "the old attic",
        "needed the warm blankets from the attic",
        "Something creaked by the window.",
        "It was only a rocking chair in the wind",
    ),
    Fear(
        "the big dog next door",
        "needed to give the neighbors their letter",
        "The dog ran up and barked.",
        "But it only wanted someone to play with",
    ),
    Fear(
        "the dark woods",
        "needed some dry sticks from the woods",
        "Something tapped and tapped above.",
        "It was only a woodpecker at work",
    ),
    Fear(
        "the geese by the pond",
        "needed the bucket that stood by the pond",
        "The biggest goose came closer and hissed.",
        "But it only wanted to keep its babies safe",
    ),
    Fear(
        "the barn at night",
        "needed someone to shut the barn door at night",
        "Two green eyes shone in the dark.",
        "It was only the old barn cat saying hello",
    ),
    Fear(
        "the long bridge",
        "needed a loaf of bread from across the bridge",
        "The boards groaned at every step.",
        "But they were as strong as could be",
    ),
    Fear(
        "the long tunnel",
        "needed some eggs from the farm behind the tunnel",
        "A deep voice said hello, hello, hello.",
        "It was only an echo",
    ),
    Fear(
        "the empty house",
        "needed a bunch of mint that grew by the empty house",
        "Something white moved at the window.",
        "It was only a curtain in the wind",
    ),
    Fear(
        "the tall scarecrow",
        "needed some beans from the field with the scarecrow",
        "Its arms moved up and down.",
        "It was only the wind in its sleeves",
    ),
)

TRICKS = (
    ("sing a happy song", "sang a happy song"),
    ("count to ten", "counted to ten"),
    ("take three deep breaths", "took three deep breaths"),
    ("think of something funny", "thought of something funny"),
    ("hum a little tune", "hummed a little tune"),
    ("whisper a poem", "whispered a poem"),
    ("stand up very straight", "stood up very straight"),
    ("think of a sunny day", "thought of a sunny day"),
)


@plot(
    lambda c: f"{c.hero.name} was not afraid of much, but there was one thing:",
    lambda c: f"{c.hero.name} had a secret fear:",
    lambda c: f"Only one thing in the world could scare {c.hero.name}:",
    lambda c: f"At night, {c.hero.name} often thought of the scariest thing of all:",
)
def fear(ctx: GrammarContext, cast: Cast) -> None:
    """A friend's trick helps to face a fear, which turns out to be harmless."""
    hero, carer, home = cast
    n = hero.name
    fear = ctx.choose(FEARS, lambda fear: f"{fear.of}.")
    ctx.start_paragraph()
    ctx.emit("One day,", "One cold evening,", "On Friday,", "Just before supper,")
    ctx.emit(f"{hero.their} {carer.kind} {fear.need}.")
    ctx.emit(
        f'"Can you go, {n}?" {carer.they} asked. "I have to stir the soup."',
        f'"My foot hurts. Will you go, {n}?" {carer.they} asked.',
        f'"You are big now, {n}. Will you help me?" {carer.they} asked.',
        f'"Please be so kind and go for me, {n}," {carer.they} said.',
    )
    ctx.emit(
        f"{n} wanted to help, but {hero.their} knees began to shake.",
        f"{n} said yes, but {hero.their} heart beat fast.",
        f"{n} did not want to say no, but {hero.they} felt cold all over.",
        f"{n} nodded, but {hero.their} mouth went dry.",
    )
    ctx.start_paragraph()
    friend = ctx.choose(FRIENDS, lambda friend: f"Outside the door, {n} met {friend.full}.")
    f = friend.name
    ctx.emit(
        f'"I am afraid of {fear.of}," {n} said.',
        f'"I am so scared of {fear.of}," {n} said.',
        f'"I do not like {fear.of} at all," {n} said.',
    )
    ctx.emit(
        f'"I get scared, too," said {f}.',
        f'"Everyone is afraid of something," said {f}.',
        f'{f} did not laugh. "I know how that feels," {friend.they} said.',
        f'"That is all right," said {f}.',
    )
    _, did = ctx.choose(TRICKS, lambda trick: f'"When I am scared, I {trick[0]}."')
    ctx.start_paragraph()
    ctx.emit(
        f"So {n} {did} like {f} and set off.",
        f"Just like {f}, {n} {did} and set off.",
        f"{n} thought of {f}, {did}, and went on.",
    )
    ctx.emit(fear.sign)
    ctx.emit(
        f"But {n} {did} again and looked closely.",
        f"Then {n} {did} once more and took a good look.",
    )
    ctx.emit(f"{fear.truth}!")
    ctx.emit(
        f'"Is that all?" laughed {n}.',
        f"{n} began to giggle.",
        f'"So that is all it is!" {n} said.',
        f"{n} had to smile.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f"Soon {n} was back at {home.the}.",
        f"{n} walked proudly back to {home.the}.",
        f"{n} skipped all the way back to {home.the}.",
    )
    ctx.emit(
        f'"How brave you are!" said {hero.their} {carer.kind}.',
        f'"Thank you, my brave {n}," said {hero.their} {carer.kind}.',
        f'"You did it!" cried {hero.their} {carer.kind}.',
    )
    ctx.emit(
        f"After that, {hero.they} was not afraid of {fear.of} any more.",
        f"And {fear.of} never looked so scary again.",
        f"{n} had learned what it means to be brave.",
    )
    ctx.summarize(
        f"{n} was afraid of {fear.of}, but {did} like {friend.full}.",
        "There was nothing to be afraid of.",
        features=("Twist",),
    )
