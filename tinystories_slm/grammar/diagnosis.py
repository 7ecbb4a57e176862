"""First break of a text with the grammar, and the earlier choice of the text that it contradicts.

The parser stops where no option of a choice continues the text. If one of the options would, had one earlier
choice been another, the text contradicts that choice: a name changed, or a thing was never introduced.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from . import words
from .grammar import Option, StoryGenerator, StoryParser
from .plots import PLOTS, courage, friends, growing, home, outdoors
from .stories import OPENINGS, run_grammar

ENDS_EARLY = "ends before the story does"
GOES_ON = "goes on after the end"
MORAL = "moral that does not fit"
OTHER_PLACE = "text of another place or plot"
WORDING = "wording that the grammar lacks"
_NAMES = {"HEROES": "hero", "CARERS": "carer", "HOMES": "home", "OPENINGS": "plot"}
_UNNAMED = "other choice"
_MIN_MATCH = 12  # characters; shorter texts stand in many places


@dataclass(frozen=True)
class Diagnosis:
    """Where a text leaves the grammar, and which constraint breaks there."""

    plot: str | None
    """Plot of the text; None if it breaks before its plot is known."""
    position: int | None
    """Characters before the piece of text that breaks; None if the grammar accepts the text."""
    constraint: str | None
    """`contradicts the hero` (or another choice), a constant of this module, or None without a break."""


@dataclass(frozen=True)
class _Step:
    name: str
    """Name of the list of options; `_UNNAMED` for alternative wordings and for lists inside others."""
    index: int
    num_options: int


class _TracingParser(StoryParser):
    """Parser that keeps its choices and the start of the piece that it reads."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.steps: list[_Step] = []
        self.piece_start = 0
        self.rest = text

    def _select_option(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        self.piece_start = self._position
        self.rest = self._text[self._position :].removeprefix(self._separator)
        option = super()._select_option(options, render)
        index = next(i for i, one in enumerate(options) if one is option)
        self.steps.append(_Step(_list_names().get(id(options), _UNNAMED), index, len(options)))
        return option


class _StopReplayError(Exception):
    """The replay reached the piece of interest."""


class _Replay(StoryGenerator):
    """Generator that repeats given choices and then collects the options of the next piece."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__(lambda _: 0)
        self._indices = iter(indices)
        self.pieces: list[str] = []

    def _select_option(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        index = next(self._indices, None)
        if index is None:
            self.pieces = [render(option) for option in options]
            raise _StopReplayError
        return options[index]


class _Collector(StoryGenerator):
    """Generator that makes the given choices, then first ones, and keeps every option."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__(lambda _: 0)
        self._indices = iter(indices)
        self.pieces: list[str] = []

    def _select_option(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        self.pieces += map(render, options)
        return options[next(self._indices, 0)]


def diagnose(text: str) -> Diagnosis:
    """Return the first break of `text` with the grammar; one without a break is a story of the grammar."""
    parser = _TracingParser(text)
    try:
        run_grammar(parser)
    except ValueError:
        constraint = _broken_constraint(parser)
        return Diagnosis(_plot_name(parser.steps), parser.piece_start, constraint)
    try:
        parser.finish()
    except ValueError:
        return Diagnosis(_plot_name(parser.steps), parser.piece_start, GOES_ON)
    return Diagnosis(_plot_name(parser.steps), None, None)


def _plot_name(steps: Sequence[_Step]) -> str | None:
    opening = next((step for step in steps if step.name == "OPENINGS"), None)
    return None if opening is None else OPENINGS[opening.index][0].name


def _broken_constraint(parser: _TracingParser) -> str:
    rest, steps = parser.rest, parser.steps
    indices = [step.index for step in steps]
    expected = _pieces_after(indices)
    if any(piece.startswith(rest) for piece in expected):
        return ENDS_EARLY
    for changed, step in _alternatives(steps):
        if any(rest.startswith(piece) for piece in _pieces_after(changed)):
            return f"contradicts the {_NAMES.get(step.name) or step.name.lower().replace('_', ' ')}"
    if _is_last_piece(indices):
        return MORAL
    is_elsewhere = any(len(piece) >= _MIN_MATCH and rest.startswith(piece) for piece in _all_pieces(steps))
    return OTHER_PLACE if is_elsewhere else WORDING


def _alternatives(steps: Sequence[_Step]) -> Iterator[tuple[list[int], _Step]]:
    """Yield the choices so far with one of them replaced; another opening may start another plot."""
    indices = [step.index for step in steps]
    # Named lists first: alternative wordings seldom matter later.
    for at, step in sorted(enumerate(steps), key=lambda pair: pair[1].name == _UNNAMED):
        if step.name == "OPENINGS":
            continue
        for other in range(step.num_options):
            if other != step.index:
                yield [*indices[:at], other, *indices[at + 1 :]], step


def _pieces_after(indices: Sequence[int]) -> list[str]:
    """Return the texts of the options that follow these choices; none at the end of the story."""
    replay = _Replay(indices)
    with suppress(_StopReplayError):
        run_grammar(replay)
    return replay.pieces


def _is_last_piece(indices: Sequence[int]) -> bool:
    return bool(_pieces_after(indices)) and not _pieces_after([*indices, 0])


def _all_pieces(steps: Sequence[_Step]) -> Iterator[str]:
    """Yield the texts of all plots, with the cast of these steps and first choices elsewhere."""
    cast = []
    for step in steps:
        if step.name == "OPENINGS":
            break
        cast.append(step.index)
    else:
        return
    for opening in _first_openings():
        collector = _Collector([*cast, opening])
        run_grammar(collector)
        yield from collector.pieces


@cache
def _first_openings() -> tuple[int, ...]:
    return tuple(next(i for i, (one, _) in enumerate(OPENINGS) if one is plot) for plot in PLOTS)


@cache
def _list_names() -> dict[int, str]:
    """Names of the lists of options, by identity: the choice of an option is a choice of a whole list."""
    modules = (words, courage, friends, growing, home, outdoors)
    named = {id(OPENINGS): "OPENINGS"}
    for module in modules:
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, tuple):
                named[id(value)] = name
    return named
