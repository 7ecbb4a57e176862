"""Near duplicates within training, and training stories that repeat validation stories.

Words are runs of letters and digits, without case. Near duplicates are found by MinHash and LSH (Broder,
1997; Leskovec et al., Mining of Massive Datasets, chapter 3). Leaks are counted exactly.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

import numpy as np

from tinystories_slm.data.batches import iter_batches
from tinystories_slm.data.progress import Arrays, SaveArrays, compute_arrays, iter_segments

DUPLICATE_NGRAM = 3
"""Words in an n-gram of `find_duplicates`."""
DUPLICATE_SIMILARITY = 0.4
"""Estimated Jaccard similarity of the 3-grams from which on two stories are near duplicates; about one
word in seven differs."""
LEAK_NGRAM = 8
"""Words in an n-gram of `Leaks`."""
LEAK_SHARE = 0.2
"""Share of a validation story's 8-grams that a training story may contain. Among 22,093 stories of
TinyStories, the highest share of unrelated ones is 0.16."""

_NUM_HASHES = 63
_ROWS_PER_BAND = 3
_SEED = 1
_BATCH_STORIES = 4096
# An n-gram in more validation stories than this is a common phrase, such as the first words of a story.
_MAX_COMMON = 64
_MAX_KNOWN_WORDS = 2**20
_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


class NgramHasher:
    """64-bit hashes of the word n-grams of stories; the same on every machine."""

    def __init__(self, num_words: int) -> None:
        self.num_words = num_words
        self._known: dict[str, int] = {}

    def hash_stories(self, stories: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of all stories, uint64 (num_ngrams,), and their starts, int64 (num_stories + 1,).

        A story of fewer words than an n-gram has one n-gram. Those that repeat within a story are kept.
        """
        words = [[self._hash_word(word) for word in _WORD.findall(story.lower())] for story in stories]
        for story in words:
            story.extend([0] * (self.num_words - len(story)))
        lengths = np.array([len(story) for story in words], dtype=np.int64)
        flat = np.array([word for story in words for word in story], dtype=np.uint64)
        hashes = np.zeros(max(len(flat) - self.num_words + 1, 0), dtype=np.uint64)
        for offset in range(self.num_words):
            hashes = hashes * _MIX ^ flat[offset : offset + len(hashes)]
            hashes ^= hashes >> np.uint64(29)
        num_ngrams = lengths - self.num_words + 1
        starts = np.concatenate([[0], np.cumsum(num_ngrams)])
        first_word = np.cumsum(lengths) - lengths
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], num_ngrams)
        return hashes[np.repeat(first_word, num_ngrams) + within], starts

    def _hash_word(self, word: str) -> int:
        found = self._known.get(word)
        if found is None:
            if len(self._known) == _MAX_KNOWN_WORDS:
                self._known.clear()
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            found = self._known[word] = int.from_bytes(digest, "little") | 1  # 0 is the padding
        return found


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Stories that repeat an earlier one."""

    first: np.ndarray
    """Index of the first story of each one's cluster, int64 (num_stories,); its own index if it is unique."""
    is_exact: np.ndarray
    """Whether it has the words of that story in their order, bool (num_stories,)."""

    @property
    def is_duplicate(self) -> np.ndarray:
        """Whether an earlier story is in the cluster, bool (num_stories,)."""
        return self.first != np.arange(len(self.first))


def find_duplicates(
    stories: Iterable[str], num_stories: int, save: SaveArrays = compute_arrays
) -> Duplicates:
    """Return the clusters of near duplicates among `num_stories` stories; `save` the hashes of each segment.

    Two stories are near duplicates if 0.4 of 63 MinHash values agree; they are compared if one of 21 bands of
    3 values agrees. A pair of similarity 0.5 is compared with probability 0.94, of 0.6 with 0.99. A cluster
    contains the near duplicates of its members. Time is linear in the number of stories; memory is about 200
    bytes for each.
    """
    signatures = np.empty((num_stories, _NUM_HASHES), dtype=np.uint16)
    whole = np.empty(num_stories, dtype=np.uint64)
    hasher, done = NgramHasher(DUPLICATE_NGRAM), 0
    for number, segment in enumerate(iter_segments(islice(stories, num_stories))):
        hashes = save(f"hashes-{number:05}", partial(_hash_segment, hasher, segment))
        rows = slice(done, done + len(hashes["whole"]))
        signatures[rows], whole[rows] = hashes["min_hashes"], hashes["whole"]
        done += len(hashes["whole"])
    first = np.arange(num_stories)
    for start in range(0, _NUM_HASHES, _ROWS_PER_BAND):
        _join_clusters(first, _combine(signatures[:, start : start + _ROWS_PER_BAND]), signatures)
    first = _find_roots(first)
    return Duplicates(first=first, is_exact=(whole == whole[first]) & (first != np.arange(num_stories)))


class Leaks:
    """Validation stories, and the share of each that a training story repeats.

    The share of a pair is the number of distinct 8-grams that both contain, divided by those of the
    validation story. It is exact for every pair that exceeds `LEAK_SHARE`.
    """

    def __init__(self, validation: Iterable[str]) -> None:
        self._hasher = NgramHasher(LEAK_NGRAM)
        # Arrays over all n-grams, some 180 for each story, are of 32 bits where they can be, and freed early.
        parts, sizes = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for batch in iter_batches(validation, _BATCH_STORIES):
            ngrams, starts = _distinct_ngrams(self._hasher, batch)
            parts.append(ngrams)
            sizes.append(np.diff(starts))
        ngrams, self._sizes = np.concatenate(parts), np.concatenate(sizes)
        del parts
        order = np.argsort(ngrams, kind="stable")
        ngrams = ngrams[order]
        self._owners = np.repeat(np.arange(len(self._sizes), dtype=np.int32), self._sizes)[order]
        del order
        is_first = np.append(True, ngrams[1:] != ngrams[:-1])[: len(ngrams)]
        self._keys = ngrams[is_first]
        self._first = np.append(np.flatnonzero(is_first), len(ngrams)).astype(np.int32)
        del ngrams, is_first
        counts = np.diff(self._first)
        is_common = np.repeat(counts > _MAX_COMMON, counts)
        self._num_common = np.bincount(self._owners[is_common], minlength=len(self._sizes))
        self._is_common_key = counts > _MAX_COMMON
        self.leaked = np.zeros(len(self._sizes), dtype=bool)
        """Validation stories that a story of `check` repeats beyond `LEAK_SHARE`, bool (num_stories,)."""
        # These cannot be found by their rare n-grams alone.
        self._limit = LEAK_SHARE * self._sizes
        self._common_stories = np.flatnonzero(self._num_common > self._limit)

    def check(self, stories: Sequence[str]) -> np.ndarray:
        """Return the validation story that each story repeats beyond `LEAK_SHARE`, int64 (num_stories,).

        -1 for a story that repeats none; of several, the one with the highest index.
        """
        ngrams, starts = _distinct_ngrams(self._hasher, stories)
        owner = np.repeat(np.arange(len(stories)), np.diff(starts))
        key = np.minimum(np.searchsorted(self._keys, ngrams), max(len(self._keys) - 1, 0))
        found = self._keys[key] == ngrams if len(self._keys) else np.zeros(len(ngrams), bool)
        key, owner = key[found], owner[found]
        rare = ~self._is_common_key[key]
        pairs = _expand(self._first, self._owners, key[rare], owner[rare])
        code, num_rare = np.unique(pairs[0] * len(self._sizes) + pairs[1], return_counts=True)
        story, target = np.divmod(code, max(len(self._sizes), 1))
        possible = num_rare + self._num_common[target] > self._limit[target]
        candidates = set(zip(story[possible].tolist(), target[possible].tolist(), strict=True))
        candidates |= self._candidates_of_common(key[~rare], owner[~rare])
        leaks = np.full(len(stories), -1)
        for one, other in sorted(candidates):
            mine = key[np.searchsorted(owner, one) : np.searchsorted(owner, one, side="right")]
            if self._num_shared(mine, other) > self._limit[other]:
                leaks[one], self.leaked[other] = other, True
        return leaks

    def _candidates_of_common(self, key: np.ndarray, owner: np.ndarray) -> set[tuple[int, int]]:
        """Return the pairs that share a common n-gram and whose validation story consists of such ones."""
        if not len(self._common_stories):
            return set()
        story, target = _expand(self._first, self._owners, key, owner)
        chosen = np.isin(target, self._common_stories)
        return set(zip(story[chosen].tolist(), target[chosen].tolist(), strict=True))

    def _num_shared(self, keys: np.ndarray, target: int) -> int:
        return sum(target in self._owners[self._first[key] : self._first[key + 1]] for key in keys.tolist())


def _distinct_ngrams(hasher: NgramHasher, stories: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct n-grams of each story, sorted, and where each story begins."""
    ngrams, starts = hasher.hash_stories(stories)
    distinct = [np.unique(ngrams[start:end]) for start, end in pairwise(starts)]
    sizes = np.array([len(story) for story in distinct], dtype=np.int64)
    flat = np.concatenate(distinct) if distinct else np.zeros(0, np.uint64)
    return flat, np.concatenate([[0], np.cumsum(sizes)])


def _expand(
    first: np.ndarray, owners: np.ndarray, key: np.ndarray, story: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return every (story, validation story) that share the n-gram at `key`, as two int64 arrays."""
    counts = (first[key + 1] - first[key]).astype(np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(story, counts), owners[np.repeat(first[key], counts) + within].astype(np.int64)


def _hash_segment(hasher: NgramHasher, stories: Iterable[str]) -> Arrays:
    """Return MinHash values, uint16 (num_stories, 63), and a hash of all words of each story, uint64."""
    min_hashes, whole = [], []
    for batch in iter_batches(stories, _BATCH_STORIES):
        min_hashes.append(_min_hashes(hasher, batch))
        whole += [_hash_words(story) for story in batch]
    return {"min_hashes": np.concatenate(min_hashes), "whole": np.array(whole, dtype=np.uint64)}


def _min_hashes(hasher: NgramHasher, stories: Sequence[str]) -> np.ndarray:
    """Return MinHash values, uint16 (num_stories, 63).

    16 of their 32 bits suffice: different values agree in them once in 65,536 times.
    """
    from rensa import RMinHash

    ngrams, starts = hasher.hash_stories(stories)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        ngrams, starts.astype(np.uint64), _NUM_HASHES, _SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).astype(np.uint16)


def _combine(values: np.ndarray) -> np.ndarray:
    """Return one hash of each row, uint64 (num_rows,)."""
    combined = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        combined = (combined ^ column) * _MIX
        combined ^= combined >> np.uint64(31)
    return combined


def _hash_words(story: str) -> int:
    words = " ".join(_WORD.findall(story.lower())) or story
    return int.from_bytes(
        hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _join_clusters(first: np.ndarray, band: np.ndarray, signatures: np.ndarray) -> None:
    """Join the clusters of stories that agree in `band`, if their signatures do.

    Each is compared with the first one and with the one before it: all pairs would be quadratic.
    """
    order = np.argsort(band, kind="stable")
    is_same = (
        np.concatenate([[False], band[order][1:] == band[order][:-1]]) if len(band) else np.zeros(0, bool)
    )
    run = np.maximum.accumulate(np.where(is_same, 0, np.arange(len(band))))
    later = np.flatnonzero(is_same)
    for partner in (run[later], later - 1):
        one, other = order[partner], order[later]
        is_near = _similarity(signatures, one, other) >= DUPLICATE_SIMILARITY
        for a, b in zip(one[is_near].tolist(), other[is_near].tolist(), strict=True):
            roots = sorted((_root(first, a), _root(first, b)))
            first[roots[1]] = roots[0]


def _similarity(signatures: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    parts = range(0, len(one), _BATCH_STORIES)
    shares = [
        (signatures[one[i : i + _BATCH_STORIES]] == signatures[other[i : i + _BATCH_STORIES]]).mean(axis=1)
        for i in parts
    ]
    return np.concatenate(shares) if shares else np.zeros(0)


def _root(first: np.ndarray, index: int) -> int:
    while first[index] != index:
        first[index] = first[first[index]]
        index = int(first[index])
    return index


def _find_roots(first: np.ndarray) -> np.ndarray:
    while not np.array_equal(roots := first[first], first):
        first = roots
    return first
