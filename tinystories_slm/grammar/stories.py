"""Generate, parse and measure the built-in corpus: a shared introduction, then one of the plots."""

import math
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from .grammar import GrammarContext, StoryGenerator, StoryParser
from .plots import PLOTS, Plot
from .words import ADJECTIVES, CARERS, HEROES, HOMES, Cast

VERSION = "1"
"""Version of the corpus; it changes whenever the text or the probability of any story changes."""

OPENINGS = tuple((plot, opening) for plot in PLOTS for opening in plot.openings)


class Story(NamedTuple):
    """Text of a story, its log-probability in nats, and what is known of it."""

    text: str
    log_prob: float
    summary: str
    """Sentences that follow from the choices of the plot."""
    features: tuple[str, ...]
    """Features of TinyStories-Instruct that the story has: always Dialogue; MoralValue if the last sentence
    states what was learned; Conflict and Twist by the plot. The grammar does not write the others."""


def write_introduction(ctx: GrammarContext) -> Cast:
    """Introduce the hero, the home and the caregiver, and return them."""
    ctx.emit(
        "Once upon a time, there was a",
        "Once upon a time, there lived a",
        "Once there was a",
        "A long time ago, there was a",
        "Once upon a time, long ago, there lived a",
    )
    ctx.choose(ADJECTIVES)
    hero = ctx.choose(HEROES, lambda hero: f"{hero.kind} named {hero.name}.")
    home = ctx.choose(HOMES, lambda home: f"{hero.They} lived in {home.a}")
    carer = ctx.choose(CARERS, lambda carer: f"with {hero.their} {carer.kind}.")
    return Cast(hero, carer, home)


def write_opening(ctx: GrammarContext, cast: Cast) -> Plot:
    """Write the first words of a plot, chosen uniformly among all openings, and return the plot."""
    plot, _ = ctx.choose(OPENINGS, lambda opening: opening[1](cast))
    return plot


def run_grammar(ctx: GrammarContext) -> Plot:
    """Write or parse one whole story and return its plot."""
    cast = write_introduction(ctx)
    plot = write_opening(ctx, cast)
    plot.write(ctx, cast)
    return plot


def generate_story(seed: int, index: int) -> Story:
    """Generate story number `index` of the corpus with this `seed`; every machine gets the same story."""
    generator = StoryGenerator(random.Random(f"{seed}/{index}").randrange)
    run_grammar(generator)
    return _describe(generator, generator.text)


def generate_corpus(num_stories: int, *, seed: int = 0) -> Iterator[str]:
    """Generate stories 0, 1, ... of the corpus with this `seed`, one at a time."""
    return (generate_story(seed, index).text for index in range(num_stories))


def parse_story(text: str) -> Story:
    """Parse `text` as a story of this grammar: `generate_story` returned the same.

    Raises:
        ValueError: `text` is not a story of this grammar; the message gives the position of the mismatch.
    """
    parser = StoryParser(text)
    run_grammar(parser)
    parser.finish()
    return _describe(parser, text)


def log_prob(text: str) -> float:
    """Return the exact log-probability of `text` in nats.

    Raises:
        ValueError: `text` is not a story of this grammar; the message gives the position of the mismatch.
    """
    return parse_story(text).log_prob


def _describe(ctx: GrammarContext, text: str) -> Story:
    """Return the story `text` that `ctx` has written or parsed."""
    last_sentence = text[text.rfind(".", 0, -1) + 1 :]
    moral = ("MoralValue",) if "learned" in last_sentence else ()
    return Story(text, ctx.log_prob, ctx.summary, ("Dialogue", *moral, *ctx.features))


@cache
def entropy() -> float:
    """Exact entropy of the corpus, in nats per story."""
    return math.fsum(math.fsum(map(math.log, branching_factors(plot))) for plot in PLOTS) / len(PLOTS)


@cache
def num_stories() -> int:
    """Number of different stories."""
    # The opening also determines the plot, so only a plot's own openings count for its stories.
    return sum(math.prod(branching_factors(plot)) * len(plot.openings) // len(OPENINGS) for plot in PLOTS)


@cache
def branching_factors(plot: Plot) -> tuple[int, ...]:
    """Number of options at each choice of a story of this plot; all its stories have the same numbers."""
    generator = StoryGenerator(lambda _: 0)
    cast = write_introduction(generator)
    write_opening(generator, cast)
    plot.write(generator, cast)
    return tuple(generator.counts)
