"""Memorization: the longest run of words that stands in a training story, and the nearest training story.

Both compare words in lower case without punctuation, with every training story and without approximation.
Training stories are read in blocks, so that memory does not grow with their number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from tinystories_slm.report_card.text import split_words

_BLOCK_STORIES = 10_000
_FIRST_CHARACTER = 0xE000  # after the surrogates, which are no characters


@dataclass
class Copy:
    """Longest run and nearest training story of one story."""

    num_words: int
    run: int = 0
    """Words of the longest run that also stands in a training story."""
    run_words: tuple[str, ...] = ()
    run_story: str = ""
    """A training story that holds the run."""
    rouge_l: float = 0.0
    """ROUGE-L (F1 of the longest common subsequence of words) against the nearest training story."""
    nearest_story: str = ""

    @property
    def run_share(self) -> float:
        """Longest run divided by the words of the story; 0 for a story without words."""
        return self.run / self.num_words if self.num_words else 0.0


def find_copies(texts: Sequence[str], training_stories: Iterable[str]) -> tuple[list[Copy], int]:
    """Return a `Copy` for each of `texts`, and the number of training stories read."""
    queries = [split_words(text) for text in texts]
    copies = [Copy(len(words)) for words in queries]
    ids = {word: number for number, word in enumerate(sorted({w for q in queries for w in q}), start=1)}
    query_ids = [[ids[word] for word in words] for words in queries]
    num_read = 0
    stories = iter(training_stories)
    while block := list(islice(stories, _BLOCK_STORIES)):
        num_read += len(block)
        block_ids = [[ids.get(word, 0) for word in split_words(story)] for story in block]
        _find_runs(copies, queries, query_ids, block_ids, block)
        _find_nearest(copies, query_ids, block_ids, block)
    return copies, num_read


def _join(stories: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all stories with a 0 after each, and the story of each position."""
    ids = np.array([i for story in stories for i in (*story, 0)], dtype=np.int64)
    return ids, np.repeat(np.arange(len(stories)), [len(story) + 1 for story in stories])


def _find_runs(
    copies: list[Copy],
    queries: Sequence[Sequence[str]],
    query_ids: Sequence[Sequence[int]],
    training_ids: Sequence[Sequence[int]],
    block: Sequence[str],
) -> None:
    """Lengthen the runs of `copies` that are longer in this block of training stories.

    Runs of n + 1 words extend common runs of n words, so the positions that remain get fewer with each n.
    The id 0 ends a run: it stands between stories and for words that no query has.
    """
    query, query_story = _join(query_ids)
    training, training_story = _join(training_ids)
    query_at, training_at = np.flatnonzero(query), np.flatnonzero(training)
    query_key, training_key = query[query_at], training[training_at]
    num_words, base = 1, int(query.max(initial=0)) + 1
    while True:
        common, query_key = np.unique(query_key, return_inverse=True)
        if not len(common):
            return
        index = np.minimum(np.searchsorted(common, training_key), len(common) - 1)
        found = common[index] == training_key
        training_at, training_key = training_at[found], index[found]
        example = np.full(len(common), -1)
        example[training_key] = training_at
        kept = example[query_key] >= 0
        query_at, query_key = query_at[kept], query_key[kept]
        stories, first = np.unique(query_story[query_at], return_index=True)
        for story, at in zip(stories.tolist(), first.tolist(), strict=True):
            if num_words > copies[story].run:
                copy, begin = copies[story], int(query_at[at] - np.searchsorted(query_story, story))
                copy.run = num_words
                copy.run_words = tuple(queries[story][begin : begin + num_words])
                copy.run_story = block[training_story[example[query_key[at]]]]
        query_at, query_key = _extend(query, query_at, query_key, num_words, base)
        training_at, training_key = _extend(training, training_at, training_key, num_words, base)
        num_words += 1


def _extend(
    ids: np.ndarray, at: np.ndarray, key: np.ndarray, num_words: int, base: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions whose run goes on after `num_words` words, and a key of the longer run."""
    following = ids[at + num_words]
    goes_on = following > 0
    return at[goes_on], key[goes_on] * base + following[goes_on]


def _find_nearest(
    copies: list[Copy],
    query_ids: Sequence[Sequence[int]],
    training_ids: Sequence[Sequence[int]],
    block: Sequence[str],
) -> None:
    """Set the ROUGE-L of `copies` that are nearer to a story of this block than to earlier ones."""
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import cdist

    # 1 - insertions and deletions / (m + n) is 2 LCS / (m + n), the F1 of ROUGE-L.
    scores = cdist(
        _as_strings(query_ids), _as_strings(training_ids), scorer=Indel.normalized_similarity, workers=-1
    )
    nearest = scores.argmax(axis=1)
    for number, (copy, at) in enumerate(zip(copies, nearest.tolist(), strict=True)):
        if copy.num_words and scores[number, at] > copy.rouge_l:
            copy.rouge_l, copy.nearest_story = float(scores[number, at]), block[at]


def _as_strings(stories: Sequence[Sequence[int]]) -> list[str]:
    """Return a string per story, one character per word: rapidfuzz compares strings faster than lists."""
    return ["".join([chr(_FIRST_CHARACTER + number) for number in story]) for story in stories]
