"""The corpus: an introduction that all stories share, then a plot; told, read and measured."""

import math
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from .grammar import Reader, Teller, Voice
from .plots import PLOTS, Plot
from .words import ADJECTIVES, CARERS, HEROES, HOMES, Cast

VERSION = "1"
"""Changes whenever the text or the probability of any story changes."""

OPENINGS = tuple((plot, opening) for plot in PLOTS for opening in plot.openings)


class Story(NamedTuple):
    """A story and its log-probability in nats."""

    text: str
    log_prob: float


def introduce(tell: Voice) -> Cast:
    """Who the story is about, and where and with whom the hero lives."""
    tell.say(
        "Once upon a time, there was a",
        "Once upon a time, there lived a",
        "Once there was a",
        "A long time ago, there was a",
        "Once upon a time, long ago, there lived a",
    )
    tell.pick(ADJECTIVES)
    hero = tell.pick(HEROES, lambda hero: f"{hero.kind} named {hero.name}.")
    home = tell.pick(HOMES, lambda home: f"{hero.They} lived in {home.a}")
    carer = tell.pick(CARERS, lambda carer: f"with {hero.their} {carer.kind}.")
    return Cast(hero, carer, home)


def begin(tell: Voice, cast: Cast) -> Plot:
    """The first words of a plot; every plot is as likely as the others."""
    plot, _ = tell.pick(OPENINGS, lambda opening: opening[1](cast))
    return plot


def tell_story_to(voice: Voice) -> Plot:
    """The whole program of a story; returns the plot it took."""
    cast = introduce(voice)
    plot = begin(voice, cast)
    plot.tell(voice, cast)
    return plot


def tell_story(seed: int, index: int) -> Story:
    """Story number `index` of the corpus numbered `seed`: the same on every machine."""
    teller = Teller(random.Random(f"{seed}/{index}").randrange)
    tell_story_to(teller)
    return Story(teller.text, teller.log_prob)


def tell_stories(num_stories: int, *, seed: int = 0) -> Iterator[str]:
    """Stories 0, 1, ... of the corpus numbered `seed`, one at a time."""
    return (tell_story(seed, index).text for index in range(num_stories))


def log_prob(text: str) -> float:
    """Exact log-probability of `text` in nats; ValueError says where it stops being a story."""
    reader = Reader(text)
    tell_story_to(reader)
    reader.finish()
    return reader.log_prob


@cache
def entropy() -> float:
    """Exact entropy of the corpus, in nats per story."""
    return math.fsum(math.fsum(map(math.log, shape(plot))) for plot in PLOTS) / len(PLOTS)


@cache
def num_stories() -> int:
    """Number of different stories."""
    # The choice of an opening settles the plot, too: a plot's own openings are one part of it.
    return sum(math.prod(shape(plot)) * len(plot.openings) // len(OPENINGS) for plot in PLOTS)


@cache
def shape(plot: Plot) -> tuple[int, ...]:
    """Number of options at each choice of a story of this plot: the same for all of them."""
    teller = Teller(lambda _: 0)
    cast = introduce(teller)
    begin(teller, cast)
    plot.tell(teller, cast)
    return tuple(teller.counts)
