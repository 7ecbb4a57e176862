"""Words, sentences, quotations and names of an English story."""

import re
from collections.abc import Sequence
from functools import cache

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)]*\s+|\n+")
_INTRODUCED = re.compile(r"\b(?:named|called)\s+([A-Z][a-z]+)")
# Capitals inside a sentence that are forms of address, days or the pronoun.
_NOT_NAMES = frozenset(
    {"i", "mom", "mommy", "mum", "mama", "dad", "daddy", "papa", "grandma", "grandpa", "granny", "auntie"}
    | {"aunt", "uncle", "mr", "mrs", "ms", "miss", "dr", "sir", "god", "christmas"}
    | {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}
)


def split_words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and digits; `don't` is one word."""
    return [match.lower().replace("\u2019", "'") for match in _WORD.findall(text)]


def split_sentences(text: str) -> list[str]:
    """Return the sentences; each ends after `.`, `!`, `?` or at a line end."""
    return [part.strip() for part in _SENTENCE_END.split(text) if _WORD.search(part)]


def count_repeated_ngrams(words: Sequence[str], size: int) -> tuple[int, int]:
    """Return how many of the n-grams occurred earlier in `words`, and how many there are."""
    ngrams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return len(ngrams) - len(set(ngrams)), len(ngrams)


def quoted_parts(text: str) -> list[str]:
    """Return what stands between double quotation marks, paragraph by paragraph."""
    return [
        part
        for line in text.split("\n")
        for part in re.findall('["\u201c]([^"\u201c\u201d]+)["\u201d]', line)
    ]


def are_quotations_closed(text: str) -> bool | None:
    """Whether each opening quotation mark is closed in its paragraph; None without quotation marks."""
    if not re.search('["\u201c\u201d]', text):
        return None
    return all(
        line.count('"') % 2 == 0 and re.sub("[^\u201c\u201d]", "", line).replace("\u201c\u201d", "") == ""
        for line in text.split("\n")
    )


def names_with_positions(text: str) -> dict[str, list[int]]:
    """Return the names and the indices of the words where they stand.

    A name has a capital inside a sentence at least once, and is no form of address and no weekday.
    """
    matches = list(_WORD.finditer(text))
    positions: dict[str, list[int]] = {}
    inside: set[str] = set()
    for index, match in enumerate(matches):
        word = re.sub("['\u2019]s$", "", match[0])
        if not re.fullmatch("[A-Z][a-z]+", word) or word.lower() in _NOT_NAMES:
            continue
        positions.setdefault(word, []).append(index)
        before = text[: match.start()].rstrip()
        if before and (before[-1].isalnum() or before[-1] in ",;"):
            inside.add(word)
    return {name: found for name, found in positions.items() if name in inside}


def introduced_name(text: str) -> str | None:
    """Return the first name that follows `named` or `called`."""
    match = _INTRODUCED.search(text)
    return match[1] if match else None


@cache
def dictionary() -> dict[str, int]:
    """English words and their counts in subtitles, of pyspellchecker's wheel."""
    from spellchecker import SpellChecker

    return dict(SpellChecker(language="en").word_frequency.dictionary)


@cache
def common_words(number: int) -> frozenset[str]:
    """Return the `number` most frequent words of the dictionary."""
    counts = dictionary()
    return frozenset(sorted(counts, key=lambda word: -counts[word])[:number])


def is_in_dictionary(word: str) -> bool:
    """Whether the dictionary has `word`, in lower case, or what stands before its `'s`."""
    return word in dictionary() or word.removesuffix("'s") in dictionary()
