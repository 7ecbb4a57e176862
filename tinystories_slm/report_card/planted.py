"""Pairs of a sound story and the same story with a known fault, to measure what a judge finds."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tinystories_slm.grammar import generate_story
from tinystories_slm.report_card.text import introduced_name

VERSION = "1"
"""Version of the set; it changes with any text of it."""
_PER_KIND = 6
_SEED = 20_000  # stories of another seed than that of the corpus
_OTHER_NAMES = ("Walter", "Ingrid", "Boris", "Matilda", "Cedric", "Yvonne")
_CONTRADICTIONS = (
    "{name} had no family and no home, and no one had ever met {name}.",
    "{name} had never left the bed on that day, and it was the middle of the night.",
    "By then {name} was a hundred years old, as on every day before.",
    "All of this happened to somebody else, and {name} was never there.",
    "{name} was far away on the moon at the same time, fast asleep.",
    "It was winter and summer, and {name} was happy because {name} was sad.",
)
_GRAMMAR_FAULTS = (
    (r"\bwas\b", "were"),
    (r"\b(She|He) (\w+ed)\b", r"\2 \1"),
    (r"\b(the|a|an) ", ""),
    (r"\band\b", "and and"),
)


@dataclass(frozen=True)
class PlantedFault:
    """A sound story, and the same story with one kind of fault."""

    kind: str
    sound: str
    faulty: str


def _swap_name(story: str, number: int, rng: random.Random) -> str:
    """Give the hero another name in the second half."""
    half = story.index(" ", len(story) // 2)
    name = introduced_name(story)
    return story[:half] + re.sub(rf"\b{name}\b", _OTHER_NAMES[number], story[half:])


def _break_grammar(story: str, number: int, rng: random.Random) -> str:
    """Break the grammar of the sentences after the introduction."""
    introduction, rest = story.split(". ", 1)
    for pattern, replacement in _GRAMMAR_FAULTS:
        rest = re.sub(pattern, replacement, rest)
    return f"{introduction}. {rest}"


def _repeat_sentence(story: str, number: int, rng: random.Random) -> str:
    """Repeat a sentence of the middle three times."""
    sentences = re.split(r"(?<=\.) (?=[A-Z])", story)
    at = rng.randrange(len(sentences) // 3, 2 * len(sentences) // 3)
    return " ".join([*sentences[:at], *[sentences[at]] * 4, *sentences[at + 1 :]])


def _contradict(story: str, number: int, rng: random.Random) -> str:
    """Put a sentence that contradicts the story at the end of its second paragraph and at its end."""
    sentence = _CONTRADICTIONS[number].format(name=introduced_name(story))
    first, second, *others = story.split("\n\n")
    return "\n\n".join([first, f"{second} {sentence}", *others]) + f" {sentence}"


_KINDS: dict[str, Callable[[str, int, random.Random], str]] = {
    "swapped name": _swap_name,
    "broken grammar": _break_grammar,
    "repeated sentence": _repeat_sentence,
    "contradiction": _contradict,
}


@cache
def planted_faults() -> tuple[PlantedFault, ...]:
    """Return the set: six stories of the built-in grammar for each kind of fault."""
    found = []
    for kind_number, (kind, plant) in enumerate(_KINDS.items()):
        number = story_number = 0
        while number < _PER_KIND:
            sound = generate_story(_SEED + kind_number, story_number).text
            faulty = plant(sound, number, random.Random(number))
            story_number += 1
            if faulty != sound:
                found.append(PlantedFault(kind, sound, faulty))
                number += 1
    return tuple(found)
