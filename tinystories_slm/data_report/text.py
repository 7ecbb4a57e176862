"""Statistics of the text of stories: lengths, openings, names and growth of the vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_OPENING_WORDS = 4
_OPENING_CHARS = 60  # of a language without blanks, too
_MARKS = re.compile("[,.;:!?]")
# Behind a lower-case letter or a comma, so that no word is capitalized because it opens a sentence.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+\b")
# A name may be written in lower case now and then; `Once` and `Then` are written so more often.
_MAX_LOWER_SHARE = 0.1
_GROWTH_POINTS = 60
_NUM_BINS = 40
_NUM_FREQUENT = 1000


class Quantiles(TypedDict):
    """Lengths of stories, in characters, words or tokens."""

    min: int
    p5: int
    median: int
    mean: float
    p95: int
    max: int


class CountedText(TypedDict):
    """An opening or a name, and the number of stories with it."""

    text: str
    num_stories: int


@dataclass
class TextStatistics:
    """Counts over stories; call `add` for each of `num_stories`."""

    num_stories: int
    num_chars: list[int] = field(default_factory=list)
    """Characters of each story."""
    num_words: list[int] = field(default_factory=list)
    """Words of each story: runs of letters and digits, with an apostrophe within."""
    openings: Counter[str] = field(default_factory=Counter)
    """First four words of each story, without commas and the like -> stories."""
    capitalized: Counter[str] = field(default_factory=Counter)
    """Capitalized word within a sentence -> stories."""
    words: Counter[str] = field(default_factory=Counter)
    """Word without case -> occurrences."""
    growth: list[tuple[int, int]] = field(default_factory=list)
    """Words read, and distinct words among them; the vocabulary at about 60 points."""

    def add(self, story: str) -> None:
        """Count one story."""
        words = _WORD.findall(story.lower())
        self.num_chars.append(len(story))
        self.num_words.append(len(words))
        self.words.update(words)
        opening = " ".join(story[:_OPENING_CHARS].split(None, _OPENING_WORDS)[:_OPENING_WORDS])
        self.openings[_MARKS.sub("", opening)] += 1
        self.capitalized.update(set(_NAME.findall(story)))
        done = len(self.num_words)
        if done * _GROWTH_POINTS // self.num_stories > (done - 1) * _GROWTH_POINTS // self.num_stories:
            self.growth.append((self.words.total(), len(self.words)))

    def top_names(self, lower_counts: Mapping[str, int], limit: int) -> list[CountedText]:
        """Return the capitalized words that are no common words, the most frequent first.

        `lower_counts` are the occurrences of words in lower case.
        """
        names = [
            (name, count)
            for name, count in self.capitalized.most_common()
            if lower_counts.get(name.lower(), 0) <= _MAX_LOWER_SHARE * count
        ]
        return [CountedText(text=name, num_stories=count) for name, count in names[:limit]]

    def top_openings(self, limit: int) -> list[CountedText]:
        """Return the most frequent openings."""
        return [CountedText(text=text, num_stories=count) for text, count in self.openings.most_common(limit)]

    def share_of_frequent_words(self) -> float:
        """Return the share of the text that its 1,000 most frequent words fill."""
        frequent = sum(count for _, count in self.words.most_common(_NUM_FREQUENT))
        return frequent / max(1, self.words.total())


def count_lower_words(chunks: Mapping[str, int]) -> Counter[str]:
    """Return the occurrences of each word that is written in lower case."""
    found: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word in _WORD.findall(chunk):
            if word.islower():
                found[word] += count
    return found


def quantiles(lengths: Sequence[int]) -> Quantiles:
    """Return the quantiles of at least one length."""
    values = np.asarray(lengths)
    low, middle, high = (int(q) for q in np.quantile(values, [0.05, 0.5, 0.95], method="nearest"))
    return Quantiles(
        min=int(values.min()), p5=low, median=middle, mean=round(float(values.mean()), 1), p95=high,
        max=int(values.max()),
    )  # fmt: skip


def histograms(named: Mapping[str, Sequence[int]]) -> dict[str, list[tuple[float, float]]]:
    """Return (middle of a bin, share of the stories in it) of each named list, over the same bins.

    The bins end at the 99.5 % quantile of the longest list; the few longer stories are left out.
    """
    longest = max(named.values(), key=len)
    end = max(1, int(np.quantile(np.asarray(longest), 0.995)))
    width = -(-end // _NUM_BINS)
    edges = np.arange(0, end + width, width)
    shares = {name: np.histogram(values, edges)[0] / max(1, len(values)) for name, values in named.items()}
    return {
        name: [(float(edge + width / 2), float(share)) for edge, share in zip(edges, found, strict=False)]
        for name, found in shares.items()
    }


def read_text(stories: Iterable[str], num_stories: int) -> TextStatistics:
    """Return the statistics of `num_stories` stories."""
    statistics = TextStatistics(num_stories)
    for story in stories:
        statistics.add(story)
    return statistics
