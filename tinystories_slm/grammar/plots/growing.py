"""Plots about growing: practice makes a skill, a seed takes its time."""

from typing import NamedTuple

from ..grammar import GrammarContext
from ..words import COLORS, FRIENDS, Cast
from .plot import plot


class Skill(NamedTuple):
    """A skill to learn, the failed first try, a tip and the success."""

    do: str
    failure: str
    tip: str
    success: str


SKILLS = (
    Skill(
        "ride a bike",
        "the bike wobbled and tipped over",
        "Look far ahead, not down at the wheels",
        "the bike rolled straight down the lane",
    ),
    Skill(
        "whistle",
        "only air came out",
        "Make a small round mouth and blow softly",
        "out came a clear, bright whistle",
    ),
    Skill(
        "juggle",
        "all three balls fell on the floor",
        "Throw each ball just as high as your nose",
        "three balls danced in the air",
    ),
    Skill(
        "skip rope",
        "the rope got stuck after one jump",
        "Count out loud and jump on every number",
        "the rope went round and round a hundred times",
    ),
    Skill(
        "swim",
        "there was nothing but splashing",
        "Kick your legs and keep your chin up",
        "the other side of the pond came closer and closer",
    ),
    Skill(
        "skate on ice",
        "there was a slip and a big bump",
        "Bend your knees and take tiny steps",
        "the ice went by as smooth as silk",
    ),
    Skill(
        "bake bread",
        "the bread came out as hard as a stone",
        "Let the dough rest until it is twice as big",
        "the bread was soft and golden",
    ),
    Skill(
        "play the flute",
        "the flute squeaked like a mouse",
        "Play one slow note after the other",
        "a lovely song filled the air",
    ),
    Skill(
        "paint a horse",
        "the horse looked like a potato",
        "Look at a real horse for a long time first",
        "the horse looked ready to run off the page",
    ),
    Skill(
        "walk on stilts",
        "the stilts slid away to both sides",
        "Keep moving and do not stand still",
        "the stilts went clip, clop across the yard",
    ),
)

COMFORTS = (
    "Nobody can do it the first time",
    "Every big thing starts small",
    "Hard things take time",
    "Everyone has to start somewhere",
    "Mistakes help us to learn",
)

PRACTICE_DAYS = ("three days", "five days", "one week", "ten days", "two weeks", "one month")


@plot(
    lambda c: f"{c.hero.name} wanted to learn how to",
    lambda c: f"More than anything, {c.hero.name} wished to",
    lambda c: f"{c.hero.name} had one big dream: to",
    lambda c: f"Every night, {c.hero.name} dreamed of one thing: to",
)
def learning(ctx: GrammarContext, cast: Cast) -> None:
    """A first try fails; a tip and practice help."""
    hero, carer, home = cast
    n = hero.name
    skill = ctx.choose(SKILLS, lambda skill: f"{skill.do}.")
    friend = ctx.choose(FRIENDS, lambda friend: f"{hero.Their} friend, {friend.full},")
    f = friend.name
    ctx.emit(
        "could do it very well.",
        "made it look so easy.",
        "did it every day.",
        "was the best at it.",
    )
    ctx.start_paragraph()
    ctx.emit("One Monday,", "One sunny morning,", "After breakfast one day,", "The next day,")
    ctx.emit(f"{n} tried it for the first time.", f"{n} gave it a try.", f"{n} began.")
    ctx.emit(
        f"{hero.They} did {hero.their} best, but {skill.failure}.",
        f"{hero.They} tried three times, but each time {skill.failure}.",
        f"But oh dear, {skill.failure}.",
    )
    ctx.emit(
        f'"I will never learn it!" {hero.they} cried.',
        f'"It is too hard for me," {hero.they} said sadly.',
        f'"I give up!" {hero.they} said with a sob.',
        f'"Why is this so hard?" {hero.they} asked.',
    )
    ctx.start_paragraph()
    comfort = ctx.choose(COMFORTS, lambda comfort: f'"{comfort}," said {hero.their} {carer.kind}')
    ctx.emit(
        f"and dried {hero.their} tears.",
        f"and hugged {hero.them}.",
        f"and sat down next to {hero.them}.",
        f"and gave {hero.them} a glass of milk.",
    )
    ctx.emit(
        f'"I will tell you a secret. {skill.tip}," said {f}.',
        f'"{skill.tip}," said {f}. "That is how I learned it."',
        f'"It took me a long time, too," said {f}. "{skill.tip}."',
        f'{f} came over to help. "{skill.tip}," {friend.they} said.',
    )
    days = ctx.choose(PRACTICE_DAYS, lambda days: f"For {days}, {n}")
    ctx.emit(
        "practiced every morning and every evening.",
        "practiced until the sun went down.",
        f"practiced and practiced, and {f} came along.",
        f"got up early in {home.the} to practice.",
    )
    ctx.emit(
        "Some days went well, and some did not.",
        "Each day, it went a little better.",
        f"When it was hard, {n} thought of what {hero.their} {carer.kind} had said.",
        f"{hero.They} did not give up.",
    )
    ctx.start_paragraph()
    ctx.emit(
        "Then, one day, it happened.",
        f"At the end, {n} took a deep breath.",
        "And then came the big day.",
        f"At last, {n} was ready.",
    )
    ctx.emit(
        f"{hero.They} tried again, and {skill.success}!",
        f"This time, {skill.success}!",
    )
    ctx.emit(
        f'"I can {skill.do}!" {n} shouted.',
        f'"Look at me! I can {skill.do}!" cried {n}.',
    )
    ctx.emit(
        f"{f} jumped up and down with joy.",
        f"{f} cheered so loudly that the birds flew up.",
        f'"I knew you could!" said {f}.',
        f'"Well done!" cried {f}.',
    )
    ctx.emit(
        f'{hero.Their} {carer.kind} smiled. "It took {days}, but you did it."',
        f'"You see?" said {hero.their} {carer.kind}. "{comfort}."',
    )
    ctx.emit(
        f"{n} was proud of all that hard work.",
        f"{n} knew now that practice makes hard things easy.",
        f"And {n} could not wait to learn the next thing.",
    )
    ctx.summarize(
        f"{n} wanted to {skill.do}, but {skill.failure}.",
        f"{friend.full} helped, and after {days} of practice {skill.success}.",
    )


class Plant(NamedTuple):
    """A plant that grows from a seed, and the food made from it."""

    kind: str
    ripe: str
    dish: str


PLANTS = (
    Plant("pumpkin", "a fat round pumpkin", "pumpkin soup"),
    Plant("sunflower", "a sunflower as tall as the roof", "sunflower bread"),
    Plant("tomato", "a bunch of red tomatoes", "tomato soup"),
    Plant("bean", "a heap of long green beans", "bean stew"),
    Plant("strawberry", "a carpet of sweet strawberries", "strawberry jam"),
    Plant("melon", "a heavy yellow melon", "melon salad"),
    Plant("pea", "a basket of fresh peas", "pea soup"),
    Plant("blueberry", "a bush of dark blueberries", "blueberry pie"),
)

BEDS = (
    *("by the kitchen door", "next to the fence", "under the window"),
    *("behind the shed", "beside the path", "in a corner of the yard"),
)


@plot(
    lambda c: f"One spring day, {c.hero.their} {c.carer.kind} gave {c.hero.name} a",
    lambda c: f"One morning, {c.hero.name} found in {c.hero.their} pocket a",
    lambda c: f"On the way home from the market, {c.hero.name} was given a",
    lambda c: f"In an old box, {c.hero.name} found a",
)
def garden(ctx: GrammarContext, cast: Cast) -> None:
    """A seed needs water and, most of all, time."""
    hero, carer, home = cast
    n = hero.name
    plant = ctx.choose(PLANTS, lambda plant: f"{plant.kind} seed.")
    ctx.start_paragraph()
    bed = ctx.choose(BEDS, lambda bed: f"{n} dug a little hole {bed}")
    ctx.emit("and put the seed inside.", "and dropped the seed in.", "and covered the seed up.")
    color = ctx.choose(COLORS, lambda color: f"Then {hero.they} watered it with a {color}")
    can = ctx.choose(("can", "bucket", "cup", "jug"), lambda can: f"{can}.")
    ctx.emit(
        f'"Grow fast, little seed!" {hero.they} said.',
        f'"I want {plant.dish} tomorrow!" {hero.they} said.',
        f'"Hurry up, please," {hero.they} told the seed.',
        f'"Soon I will have {plant.dish}!" {hero.they} said.',
    )
    ctx.emit(
        "But the next day, there was nothing to see.",
        "But in the morning, the ground was still bare.",
        "But one day went by, and then two, and nothing grew.",
        "But nothing came up, not even a tiny leaf.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f'"It does not work!" cried {n}. "I will dig it up."',
        f'"My seed is broken," {n} said. "I want to dig it out."',
        f'"It is taking too long!" said {n} and stamped on the ground.',
        f'"I am tired of waiting!" said {n} and took a spoon to dig.',
    )
    friend = ctx.choose(FRIENDS, lambda friend: f"{friend.full} looked over the fence.")
    f = friend.name
    ctx.emit(
        f'"Wait," said {f}.',
        f'"Leave it alone, my friend," said {f}.',
        f'"Be patient," {f} said.',
        f'"Stop, do not touch it," said {f}.',
    )
    ctx.emit(
        '"A seed has a lot of work to do under the ground."',
        '"You cannot see it, but it is growing in the dark."',
        '"Good things need time, and so does your seed."',
    )
    ctx.emit(
        f"So every day, {n} took the {color} {can} and watered the ground.",
        f"So {n} waited and filled the {color} {can} every morning.",
        f"So {n} gave it water from the {color} {can} and did not dig.",
    )
    ctx.start_paragraph()
    ctx.emit(
        "Then, one warm morning, a green tip came out of the ground.",
        "After two weeks, there was a tiny green leaf.",
        "And one day after the rain, there was a little sprout.",
        "One morning, something small and green stood in the sun.",
    )
    ctx.emit(
        f"It grew all summer, and in the end there was {plant.ripe} {bed}.",
        f"By the end of summer, there was {plant.ripe} {bed}.",
        f"It grew and grew, and soon there was {plant.ripe} {bed}.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f"{n} and {hero.their} {carer.kind} made {plant.dish} and asked {f} to {home.the}.",
        f"{n}'s {carer.kind} made {plant.dish}, and {f} came to {home.the} to eat.",
        f"At {home.the}, {n}'s {carer.kind} made {plant.dish}, and {f} had three helpings.",
    )
    ctx.emit(
        f'"This was worth waiting for," said {n}.',
        f'"I am glad I did not dig it up," {n} said.',
        f'"You were right, {f}. Good things need time," said {n}.',
        f'"It tastes so good because I waited," said {n}.',
        f"That was how {n} learned to be patient.",
        "All that had come from one small seed and a lot of patience.",
    )
    ctx.summarize(
        f"{n} planted a {plant.kind} seed {bed} and grew tired of waiting.",
        f"{friend.full} said that it needs time, and in the end there was {plant.ripe}.",
    )
