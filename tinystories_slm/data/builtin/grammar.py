"""Stories with a known probability: one program tells them and reads them back.

A plot is a function that tells its story to a `Voice`, calling `say` and `pick`. Both put the next
piece of the story into the text; where several pieces are offered, one of them is taken, each with
the same probability. Nothing is ever chosen out of sight, and no offered piece is the beginning of
another, so the text alone says what was chosen: a `Teller` runs the program with a source of
choices and gets a story, a `Reader` runs the same program with a story and gets the choices back,
and with them the probability.

Pieces are joined by a blank, or by an empty line after `paragraph()`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, takewhile
from typing import TypeVar

Option = TypeVar("Option")


class Voice(ABC):
    """What a plot speaks to. `counts` keeps the number of options of each choice made so far."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._gap = ""  # what stands before the next piece

    def say(self, *wordings: str) -> None:
        """Continue with one of `wordings`, each as likely as the others."""
        if len(wordings) == 1:
            self._speak(wordings[0])
        else:
            self.pick(wordings)

    def pick(self, options: Sequence[Option], render: Callable[[Option], str] = str) -> Option:
        """Continue with `render(option)` for one of `options`, each as likely, and return it."""
        option = self._choose(options, render)
        self.counts.append(len(options))
        self._gap = " "
        return option

    def paragraph(self) -> None:
        """Let the next piece begin a new paragraph."""
        self._gap = "\n\n"

    @property
    def log_prob(self) -> float:
        """Log-probability of the choices made so far, in nats."""
        return -math.fsum(map(math.log, self.counts))

    def _speak(self, text: str) -> None:
        self._choose((text,), str)
        self._gap = " "

    @abstractmethod
    def _choose(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option: ...


class Teller(Voice):
    """Makes a story up: for each choice among n options, `choose(n)` returns one of 0 ... n - 1."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        super().__init__()
        self._draw = choose
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The story so far."""
        return "".join(self._pieces)

    def _choose(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        option = options[self._draw(len(options)) if len(options) > 1 else 0]
        self._pieces += self._gap, render(option)
        return option


class CarefulTeller(Teller):
    """Puts every option into words and refuses those that a reader could confuse."""

    def _choose(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        texts = sorted(map(render, options))
        # Whatever sorts between a text and its continuation begins with that text, too.
        for text, following in pairwise(texts):
            if following.startswith(text):
                raise ValueError(f"a reader cannot tell apart {text!r} and {following!r}")
        return super()._choose(options, render)


class Reader(Voice):
    """Follows a told story: at each choice, the option taken is the one whose text comes next."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self._position = 0

    def finish(self) -> None:
        """Raise ValueError if the story goes on after its end."""
        if self._position != len(self._text):
            raise self._lost(self._position)

    def _choose(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        text, start = self._text, self._position
        if not text.startswith(self._gap, start):
            raise self._lost(start)
        start += len(self._gap)
        found: Option | None = None
        for option in options:
            piece = render(option)
            if text.startswith(piece, start):
                if found is not None:
                    raise RuntimeError(f"two options continue the story at character {start}: {piece!r}")
                found = option
                self._position = start + len(piece)
        if found is None:
            raise self._lost(start + _agreement(text[start:], map(render, options)))
        return found

    def _lost(self, position: int) -> ValueError:
        excerpt = self._text[max(0, position - 20) : position + 20]
        return ValueError(
            f"not a story of this grammar: no option fits at character {position}, in {excerpt!r}"
        )


def _agreement(text: str, pieces: Iterable[str]) -> int:
    """Number of characters for which `text` agrees with the best of `pieces`."""
    return max(
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, piece, strict=False)))
        for piece in pieces
    )
