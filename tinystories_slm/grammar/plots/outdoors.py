"""Plots out of doors: something is lost, someone is hurt."""

from typing import NamedTuple

from ..grammar import GrammarContext
from ..words import COLORS, NAMES, Cast
from .plot import plot


class Trouble(NamedTuple):
    """The reason the hero cannot fetch a thing, and the helpers who can: (kind, action of this kind)."""

    lament: str
    boast: str
    helpers: tuple[tuple[str, str], ...]


HIGH = Trouble(
    "That is much too high for me!",
    "I love to be up high",
    (
        ("squirrel", "raced all the way up"),
        ("magpie", "flew right up"),
        ("raccoon", "climbed all the way up"),
        ("crow", "flapped up"),
    ),
)
WET = Trouble(
    "That water is much too deep for me!",
    "I love to swim",
    (
        ("duck", "paddled out"),
        ("frog", "jumped in with a splash"),
        ("swan", "glided out"),
        ("beaver", "swam out"),
    ),
)
NARROW = Trouble(
    "I am much too big to crawl in there!",
    "It is good to be tiny",
    (
        ("mouse", "crept in"),
        ("lizard", "slipped in"),
        ("chipmunk", "scurried in"),
        ("mole", "wriggled in"),
    ),
)
HEAVY = Trouble(
    "They are much too heavy for me to move!",
    "I am very strong",
    (
        ("bear", "gave one big push"),
        ("horse", "leaned in and pushed"),
        ("bull", "pushed and pushed"),
        ("moose", "took a deep breath, pushed hard,"),
    ),
)

WINDY_PLACES: tuple[tuple[str, tuple[tuple[str, Trouble], ...]], ...] = (
    (
        "to the beach",
        (
            ("at the top of a palm tree", HIGH),
            ("far out in the sea", WET),
            ("in a crack in the cliff", NARROW),
            ("between two huge rocks", HEAVY),
        ),
    ),
    (
        "to the forest",
        (
            ("at the top of a pine tree", HIGH),
            ("in a deep stream", WET),
            ("in a hollow log", NARROW),
            ("between two fallen trees", HEAVY),
        ),
    ),
    (
        "to the park",
        (
            ("on top of a lamp post", HIGH),
            ("in the duck pond", WET),
            ("under a prickly bush", NARROW),
            ("between two stone benches", HEAVY),
        ),
    ),
    (
        "up the hill",
        (
            ("at the top of an oak tree", HIGH),
            ("in a deep pool", WET),
            ("in a narrow cave", NARROW),
            ("between two big boulders", HEAVY),
        ),
    ),
    (
        "to the farm",
        (
            ("on the roof of the barn", HIGH),
            ("in the mill pond", WET),
            ("under the hen house", NARROW),
            ("between two full hay carts", HEAVY),
        ),
    ),
    (
        "to the meadow",
        (
            ("at the top of a birch tree", HIGH),
            ("in the middle of the river", WET),
            ("inside a thick hedge", NARROW),
            ("between two heavy logs", HEAVY),
        ),
    ),
)

LIGHT_THINGS = (
    *("kite", "hat", "scarf", "ribbon", "toy plane"),
    *("cloth doll", "flag", "cape", "pinwheel", "paper bird"),
)


@plot(
    lambda c: f"{c.hero.name} loved one thing most of all:",
    lambda c: f"Wherever {c.hero.name} went, one thing came along:",
    lambda c: f"For {c.hero.their} birthday, {c.hero.name} got something special:",
    lambda c: f"Of all the things in {c.home.the}, {c.hero.name} liked one best:",
)
def lost_thing(ctx: GrammarContext, cast: Cast) -> None:
    """The wind carries a treasure to a place that only a helper with the right skill can reach."""
    hero, carer, home = cast
    n = hero.name
    color = ctx.choose(COLORS, lambda color: f"a {color}")
    thing = ctx.choose(LIGHT_THINGS, lambda thing: f"{thing}.")
    ctx.start_paragraph()
    ctx.emit("One windy day,", "One fresh spring morning,", "One gray afternoon,", "One Sunday,")
    _, spots = ctx.choose(WINDY_PLACES, lambda place: f"{n} took the {thing} {place[0]}.")
    ctx.emit(
        f"Whoosh! A gust of wind pulled the {thing} away.",
        f"Suddenly, the wind grabbed the {thing} and carried it off.",
        f"The wind blew and blew, and the {thing} flew away.",
        f"Then a strong wind came and took the {thing}.",
    )
    spot, trouble = ctx.choose(spots, lambda spot: f"{n} ran after it, but it landed {spot[0]}.")
    ctx.emit(f'"Oh no!" cried {n}.', f'"Oh dear!" said {n}.', f'"My {thing}!" {n} called.')
    ctx.emit(f'"{trouble.lament}"')
    ctx.emit(
        f"{hero.They} sat down and began to cry.",
        f"{hero.They} felt very sad.",
        f"{hero.They} did not know what to do.",
        f"{hero.They} wiped away a tear.",
    )
    ctx.start_paragraph()
    kind, deed = ctx.choose(trouble.helpers, lambda helper: f"Just then, a {helper[0]}")
    helper = ctx.choose(NAMES, lambda name: f"named {name} came by.")
    ctx.emit(
        f'"Please help me! My {color} {thing} is {spot}," said {n}.',
        f'"My {color} {thing} is {spot}," said {n}. "Can you help me?"',
        f'"Can you get my {color} {thing}? It is {spot}," said {n}.',
    )
    ctx.emit(
        f'"Of course! {trouble.boast}," said {helper}.',
        f'"{trouble.boast}," said the {kind}.',
        f'{helper} smiled and said, "{trouble.boast}."',
    )
    ctx.emit(
        f"{helper} {deed} and soon came back with the {color} {thing}.",
        f"The {kind} {deed} and brought back the {color} {thing}.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f'"Thank you, {helper}!" said {n}.',
        f'"You are the best {kind} in the world!" said {n}.',
        f"{n} laughed and gave {helper} a big hug.",
        f'"You saved my {thing}!" said {n}.',
    )
    ctx.emit(
        f"The two of them played with the {thing} until the sun went down.",
        f"They took turns with the {thing} all day long.",
        f"From then on, {n} and {helper} were good friends.",
        f"They had fun with the {thing} until it was time for supper.",
    )
    ctx.emit(
        f"Back at {home.the}, {n} told {hero.their} {carer.kind} all about the {kind}.",
        f"At bedtime, {n} told {hero.their} {carer.kind} about the kind {kind}.",
    )
    ctx.emit(
        f"{n} had learned that it is good to ask for help.",
        f"And {n} was never too shy to ask for help again.",
        f"Now {n} knew that everyone is good at something.",
    )
    ctx.summarize(
        f"The wind took the {color} {thing} of {n}, and it landed {spot}.",
        f"A {kind} named {helper} {deed} and brought it back.",
    )


class Rescue(NamedTuple):
    """An animal in need: its trouble, the help, its departure and its later thanks."""

    animal: str
    trouble: str
    care: str
    leave: str
    thanks: str


RESCUES = (
    Rescue(
        "baby bird",
        "had fallen down and hurt its wing",
        "made it a nest out of an old sock",
        "flew up into the blue sky",
        "sang a sweet song at the window",
    ),
    Rescue(
        "kitten",
        "was wet and cold",
        "dried it with a towel and gave it warm milk",
        "ran off to find its mother",
        "left a little mouse made of grass at the door",
    ),
    Rescue(
        "turtle",
        "had a crack in its shell",
        "put a bandage on its shell and fed it lettuce",
        "walked slowly back to its pond",
        "carried a smooth, shiny stone to the door",
    ),
    Rescue(
        "butterfly",
        "was too weak to fly",
        "put it on a flower and gave it sugar water",
        "danced away over the roof",
        "brought all its friends to the garden",
    ),
    Rescue(
        "duckling",
        "had lost its way and was hungry",
        "gave it crumbs and a bowl of water to swim in",
        "waddled off to its brothers and sisters",
        "danced a funny duck dance on the path",
    ),
    Rescue(
        "bumblebee",
        "had rain on its wings and could not fly",
        "warmed it by the lamp and gave it honey",
        "buzzed out into the sunshine",
        "showed the way to the sweetest berries",
    ),
    Rescue(
        "baby squirrel",
        "had a thorn in its foot",
        "pulled out the thorn and made it a soft bed",
        "jumped back into the trees",
        "put a pile of nuts on the step",
    ),
    Rescue(
        "baby owl",
        "had bumped its head on a branch",
        "let it rest in a dark and quiet box",
        "flew off under the moon",
        "dropped a soft gray feather by the window",
    ),
)

RESCUE_PLACES = (
    *("in the forest", "by the river", "near the old mill", "behind the barn"),
    *("in the meadow", "beside the road", "under the apple trees", "at the edge of the field"),
    *("in the park", "near the old well", "next to the fence", "on the hill"),
)

PET_NAMES = (
    *("Button", "Pebble", "Sunny", "Dot", "Twinkle", "Bean", "Clover", "Biscuit"),
    *("Cookie", "Peanut", "Muffin", "Bubble", "Lucky", "Snowy", "Cinnamon", "Fuzzy"),
)


@plot(
    lambda c: f"One morning, {c.hero.name} was picking flowers",
    lambda c: f"One afternoon, {c.hero.name} was out for a walk",
    lambda c: f"One day, {c.hero.name} was looking for pretty stones",
    lambda c: f"On a sunny day, {c.hero.name} was playing",
)
def hurt_animal(ctx: GrammarContext, cast: Cast) -> None:
    """The hero nurses a small animal and releases it; later it returns the favor."""
    hero, carer, home = cast
    n = hero.name
    ctx.choose(RESCUE_PLACES, lambda place: f"{place} when something made a tiny sound.")
    ctx.start_paragraph()
    ctx.emit(
        f'"Who is there?" asked {n}.',
        f'"What was that?" {n} whispered.',
        f"{n} stopped and looked around.",
        f"{n} stood still and listened.",
    )
    rescue = ctx.choose(RESCUES, lambda rescue: f"On the ground sat a {rescue.animal}.")
    a = rescue.animal
    ctx.emit(f"The poor {a} {rescue.trouble}.", f"It {rescue.trouble}.")
    ctx.emit(
        f'"Do not be afraid," said {n}.',
        f'"You poor thing!" {n} said.',
        f'"I will help you," {n} said softly.',
        f'"You cannot stay here all alone," said {n}.',
    )
    ctx.emit(
        f"Very gently, {hero.they} carried the {a} home.",
        f"{hero.They} picked up the {a} and took it to {home.the}.",
        f"{hero.They} held the {a} close and hurried home.",
        f"{hero.They} put the {a} into a soft hat and brought it to {home.the}.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f'"Look, {carer.name}, it needs us," {hero.they} said.',
        f'"{carer.name}, what can we do for it?" {hero.they} asked.',
        f'{hero.Their} {carer.kind} looked at it and said, "Let us help it."',
        f'"Poor little one," said {hero.their} {carer.kind}.',
    )
    ctx.emit(f"Together, they {rescue.care}.", f"So they {rescue.care}.")
    name = ctx.choose(PET_NAMES, lambda name: f"{n} called it {name}.")
    ctx.emit(
        f"Every day, {n} sat with {name} and told it stories.",
        f"Every evening, {n} sang a soft song for {name}.",
        f"{n} looked after {name} day and night.",
        f"{n} and {name} played quiet games together.",
    )
    ctx.choose(
        ("three days", "four days", "five days", "one week", "ten days", "two weeks"),
        lambda days: f"After {days}, {name} was well again.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f'"Now you are strong enough to go home," said {n}.',
        f'"It is time to say goodbye," said {n}.',
        f'"I will miss you, {name}," said {n}.',
        f'"Goodbye, {name}. Take care," said {n}.',
    )
    ctx.emit(
        f"{hero.They} opened the door, and {name} {rescue.leave}.",
        f"They went outside together, and {name} {rescue.leave}.",
    )
    ctx.start_paragraph()
    ctx.emit(
        f"When spring came, {name} came back and {rescue.thanks}.",
        f"One month later, {name} came back and {rescue.thanks}.",
        f"The next summer, {name} came back and {rescue.thanks}.",
        f"On {hero.their} birthday, {name} came back and {rescue.thanks}.",
    )
    ctx.emit(
        f'"You remember me!" cried {n}.',
        f'"Thank you, dear {name}!" cried {n}.',
        f'"What a nice surprise!" cried {n}.',
    )
    ctx.emit(
        f"{n} learned that a kind deed is never forgotten.",
        f"{n} and {hero.their} {carer.kind} smiled, for kindness always comes back.",
        f"Even a small {a} can be a true friend.",
    )
    ctx.summarize(
        f"{n} found a {a} that {rescue.trouble}.",
        f"{n} and {hero.their} {carer.kind} called it {name} and {rescue.care}.",
        f"Later, {name} {rescue.thanks}.",
    )
