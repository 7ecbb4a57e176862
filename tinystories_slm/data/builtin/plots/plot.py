"""What a plot is: its openings, told after the introduction, and a function that tells the rest."""

from collections.abc import Callable
from typing import NamedTuple

from ..grammar import Voice
from ..words import Cast

Opening = Callable[[Cast], str]


class Plot(NamedTuple):
    """`openings` are the plot's own first words; `tell` continues after any of them."""

    name: str
    openings: tuple[Opening, ...]
    tell: Callable[[Voice, Cast], None]


def plot(*openings: Opening) -> Callable[[Callable[[Voice, Cast], None]], Plot]:
    """Make a plot of the function below, which then continues any of `openings`.

    The number of options at each choice must not depend on earlier choices (lists of equal length),
    and no option's text may begin another's; the tests check both.
    """

    def make(tell: Callable[[Voice, Cast], None]) -> Plot:
        return Plot(tell.__name__, openings, tell)

    return make
