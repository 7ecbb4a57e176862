"""A story grammar that both generates and parses: the same plot functions run in both directions.

A plot is a function that writes its story to a `GrammarContext` with `emit` and `choose`. Both append
the next piece of text. If several options are given, one of them is chosen uniformly. Every choice
appears in the text, and no option is a prefix of another, so the text alone determines all choices.
A `StoryGenerator` runs a plot with a source of random indices and yields a story. A `StoryParser` runs
the same plot on an existing story and recovers its choices, and with them its probability.

Pieces are joined by a space, or by an empty line after `start_paragraph()`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, takewhile
from typing import TypeVar

Option = TypeVar("Option")


class GrammarContext(ABC):
    """Interface that plots write to; `counts` holds the number of options of each choice so far."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.summary = ""
        """Summary of the story in whole sentences; the plot sets it at its end."""
        self.features: tuple[str, ...] = ()
        """Features of TinyStories-Instruct that every story of the plot has."""
        self._separator = ""  # precedes the next piece

    def emit(self, *wordings: str) -> None:
        """Append one of `wordings`, chosen uniformly."""
        if len(wordings) == 1:
            self._emit_text(wordings[0])
        else:
            self.choose(wordings)

    def choose(self, options: Sequence[Option], render: Callable[[Option], str] = str) -> Option:
        """Append `render(option)` for one of `options`, chosen uniformly, and return the option."""
        option = self._select_option(options, render)
        self.counts.append(len(options))
        self._separator = " "
        return option

    def start_paragraph(self) -> None:
        """Start a new paragraph with the next piece."""
        self._separator = "\n\n"

    def summarize(self, *sentences: str, features: tuple[str, ...] = ()) -> None:
        """Set the summary and the features of the story; neither changes its text."""
        self.summary = " ".join(sentences)
        self.features = features

    @property
    def log_prob(self) -> float:
        """Log-probability of the choices made so far, in nats."""
        return -math.fsum(map(math.log, self.counts))

    def _emit_text(self, text: str) -> None:
        self._select_option((text,), str)
        self._separator = " "

    @abstractmethod
    def _select_option(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option: ...


class StoryGenerator(GrammarContext):
    """Generate a story: `draw_index(n)` returns an index from 0 to n - 1 for each choice among n options."""

    def __init__(self, draw_index: Callable[[int], int]) -> None:
        super().__init__()
        self._draw_index = draw_index
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Text of the story so far."""
        return "".join(self._pieces)

    def _select_option(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        option = options[self._draw_index(len(options)) if len(options) > 1 else 0]
        self._pieces += self._separator, render(option)
        return option


class PrefixFreeGenerator(StoryGenerator):
    """Render all options of every choice and raise ValueError if one is a prefix of another."""

    def _select_option(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        texts = sorted(map(render, options))
        # Every text that sorts between a text and its continuation starts with that text as well,
        # so comparing neighbors is enough.
        for text, following in pairwise(texts):
            if following.startswith(text):
                raise ValueError(f"ambiguous options: {text!r} is a prefix of {following!r}")
        return super()._select_option(options, render)


class StoryParser(GrammarContext):
    """Parse an existing story: each choice selects the option whose text comes next."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self._position = 0

    def finish(self) -> None:
        """Raise ValueError if text follows the end of the story."""
        if self._position != len(self._text):
            raise self._parse_error(self._position)

    def _select_option(self, options: Sequence[Option], render: Callable[[Option], str]) -> Option:
        text, start = self._text, self._position
        if not text.startswith(self._separator, start):
            raise self._parse_error(start)
        start += len(self._separator)
        found: Option | None = None
        for option in options:
            piece = render(option)
            if text.startswith(piece, start):
                if found is not None:
                    raise RuntimeError(f"two options continue the story at character {start}: {piece!r}")
                found = option
                self._position = start + len(piece)
        if found is None:
            raise self._parse_error(start + _common_prefix_length(text[start:], map(render, options)))
        return found

    def _parse_error(self, position: int) -> ValueError:
        excerpt = self._text[max(0, position - 20) : position + 20]
        return ValueError(
            f"not a story of this grammar: no option matches at character {position}, in {excerpt!r}"
        )


def _common_prefix_length(text: str, pieces: Iterable[str]) -> int:
    """Length of the longest prefix that `text` shares with any of `pieces`."""
    return max(
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, piece, strict=False)))
        for piece in pieces
    )
