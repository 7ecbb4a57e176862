"""Type of a plot: its openings, which follow the introduction, and a function that writes the rest."""

from collections.abc import Callable
from typing import NamedTuple

from ..grammar import GrammarContext
from ..words import Cast

Opening = Callable[[Cast], str]


class Plot(NamedTuple):
    """A plot: `openings` are its alternative first words; `write` continues after any of them."""

    name: str
    openings: tuple[Opening, ...]
    write: Callable[[GrammarContext, Cast], None]


def plot(*openings: Opening) -> Callable[[Callable[[GrammarContext, Cast], None]], Plot]:
    """Turn the decorated function into a `Plot` that continues any of `openings`.

    The number of options at each choice must not depend on earlier choices, so lists must have equal
    length. No option's text may be a prefix of another's. The tests check both rules.
    """

    def decorate(write: Callable[[GrammarContext, Cast], None]) -> Plot:
        return Plot(write.__name__, openings, write)

    return decorate
