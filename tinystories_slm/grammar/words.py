"""Word lists of the stories: characters, homes, friends, adjectives and colors."""

from typing import NamedTuple


class Character(NamedTuple):
    """A character, with its pronouns."""

    name: str
    kind: str
    they: str
    them: str
    their: str
    They: str
    Their: str

    @property
    def full(self) -> str:
        """Full name, such as "Tilly the duck"."""
        return f"{self.name} the {self.kind}"

    @property
    def a_kind(self) -> str:
        """Kind with its article, such as "a duck" or "an owl"."""
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"


def she(name: str, kind: str) -> Character:
    """Return a character with the pronouns she, her, her."""
    return Character(name, kind, "she", "her", "her", "She", "Her")


def he(name: str, kind: str) -> Character:
    """Return a character with the pronouns he, him, his."""
    return Character(name, kind, "he", "him", "his", "He", "His")


class Home(NamedTuple):
    """A home: its first description and its later name."""

    a: str
    the: str


class Cast(NamedTuple):
    """Characters and home that the introduction chose, for every plot to use."""

    hero: Character
    carer: Character
    """Caregiver the hero lives with; `kind` is, for example, "mom", and `name` the form of address, "Mom"."""
    home: Home


# No hero is a good climber, a swimmer, tiny or strong: the plots need friends for these skills.
HEROES = (
    *(she(name, "girl") for name in ("Lily", "Mia", "Anna", "Sara", "Emma", "Lucy")),
    *(she(name, "girl") for name in ("Nora", "Zoe", "Ella", "Ruby", "Clara", "Maya", "Alice", "Molly")),
    *(he(name, "boy") for name in ("Tim", "Ben", "Max", "Sam", "Leo", "Jack")),
    *(he(name, "boy") for name in ("Noah", "Finn", "Tom", "Adam", "Oscar", "Theo", "Peter", "David")),
    *(she("Poppy", "fox"), he("Pip", "fox"), she("Daisy", "bunny"), he("Hop", "bunny")),
    *(she("Bella", "puppy"), he("Rex", "puppy"), she("Rosie", "piglet"), he("Hugo", "piglet")),
    *(
        she("Fluffy", "lamb"),
        he("Woolly", "lamb"),
        she("Holly", "hedgehog"),
        he("Spike", "hedgehog"),
    ),
    *(she("Betty", "badger"), he("Bobby", "badger"), she("Willow", "fawn"), he("Dapple", "fawn")),
    *(she("Tessa", "donkey"), he("Eddie", "donkey"), she("Gigi", "calf"), he("Archie", "calf")),
)

CARERS = (
    she("Mom", "mom"),
    he("Dad", "dad"),
    she("Grandma", "grandma"),
    he("Grandpa", "grandpa"),
    she("Auntie", "aunt"),
    he("Uncle", "uncle"),
)

HOMES = (
    Home("a small house near the forest", "the small house"),
    Home("a yellow cottage by the river", "the yellow cottage"),
    Home("a white house on a hill", "the white house"),
    Home("a cozy cabin beside the lake", "the cozy cabin"),
    Home("a red farmhouse next to a field", "the red farmhouse"),
    Home("a crooked house by the lane", "the crooked house"),
    Home("a stone cottage in the valley", "the stone cottage"),
    Home("a round house with a green door", "the round house"),
    Home("a tiny house behind the mill", "the tiny house"),
    Home("a brick house in the town", "the brick house"),
    Home("a blue house by the sea", "the blue house"),
    Home("a snug hut under tall trees", "the snug hut"),
    Home("a wooden house by the road", "the wooden house"),
    Home("a pink cottage in a garden", "the pink cottage"),
    Home("a narrow house in a village", "the narrow house"),
    Home("a log cabin in the mountains", "the log cabin"),
)

FRIENDS = (
    she("Tilly", "duck"),
    he("Bruno", "bear"),
    she("Hazel", "squirrel"),
    he("Milo", "mouse"),
    she("Olive", "owl"),
    he("Gus", "goat"),
    she("Penny", "pony"),
    he("Felix", "frog"),
    she("Coco", "cat"),
    he("Toby", "turtle"),
    she("Greta", "goose"),
    he("Otto", "otter"),
    she("Paula", "penguin"),
    he("Kai", "kangaroo"),
    she("Suki", "sheep"),
    he("Ralph", "rabbit"),
    she("Dolly", "donkey"),
    he("Perry", "parrot"),
    she("Winnie", "weasel"),
    he("Harry", "hamster"),
)

# Names of helpers whose kind is chosen before the name; no pronoun refers to them.
NAMES = (
    *("Nina", "Pearl", "Dora", "Ivy", "Mabel", "June", "Wanda", "Flora"),
    *("Rufus", "Barney", "Chip", "Walter", "Monty", "Jasper", "Ziggy", "Hector"),
)

ADJECTIVES = (
    *("little", "small", "cheerful", "kind", "curious", "gentle"),
    *("merry", "friendly", "lively", "clever", "playful", "sweet"),
    *("happy", "polite", "bright", "helpful"),
)

COLORS = (
    *("red", "blue", "green", "yellow", "purple"),
    *("pink", "white", "brown", "gray", "black"),
)
