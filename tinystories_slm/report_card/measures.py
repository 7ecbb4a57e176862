"""Measures of stories that need no model: each is a mean over stories, or over groups of ten stories."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinystories_slm.report_card.text import (
    are_quotations_closed,
    common_words,
    count_repeated_ngrams,
    introduced_name,
    is_in_dictionary,
    names_with_positions,
    quoted_parts,
    split_sentences,
    split_words,
)

GROUP_SIZE = 10
"""Stories of a group: diversity then does not depend on how many stories a card has."""
_DISTINCT_WORDS = 100
_NUM_COMMON_WORDS = 2000

Format = Literal["share", "number"]


@dataclass(frozen=True)
class CardStory:
    """A generated or held-out story."""

    text: str
    ended: bool = True
    """Whether the model ended it; False if it reached the length limit. Held-out stories end."""
    prompt: str = ""
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure with one value per story, or per group of `GROUP_SIZE` stories."""

    name: str
    """Key in the JSON file."""
    title: str
    definition: str
    """One sentence."""
    of_story: Callable[[CardStory], float] | None = None
    """Value of a story; NaN where it is not defined. Either this or `of_group` is set."""
    of_group: Callable[[Sequence[CardStory]], float] | None = None
    format: Format = "share"

    def values(self, stories: Sequence[CardStory]) -> np.ndarray:
        """Return the values (N,) of the stories or groups, without those that are not defined."""
        if self.of_story is not None:
            found = [self.of_story(story) for story in stories]
        else:
            groups = [stories[at : at + GROUP_SIZE] for at in range(0, len(stories), GROUP_SIZE)]
            found = [self.of_group(group) for group in groups if len(group) == GROUP_SIZE]
        return np.array([value for value in found if not math.isnan(value)], dtype=float)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _as_share(value: bool | None) -> float:
    return math.nan if value is None else float(value)


def _words_per_sentence(story: CardStory) -> float:
    return _share(len(split_words(story.text)), len(split_sentences(story.text)))


def _repetition(story: CardStory) -> float:
    return _share(*count_repeated_ngrams(split_words(story.text), 4))


def _repeats_a_sentence(story: CardStory) -> float:
    sentences = [sentence.lower() for sentence in split_sentences(story.text)]
    return float(len(set(sentences)) < len(sentences)) if sentences else math.nan


def _unknown_words(story: CardStory) -> float:
    names = {name.lower() for name in names_with_positions(story.text)}
    words = [word for word in split_words(story.text) if word.removesuffix("'s") not in names]
    return _share(sum(not is_in_dictionary(word) for word in words), len(words))


def _rare_words(story: CardStory) -> float:
    names = {name.lower() for name in names_with_positions(story.text)}
    words = [word.removesuffix("'s") for word in split_words(story.text)]
    words = [word for word in words if word not in names]
    common = common_words(_NUM_COMMON_WORDS)
    return _share(sum(word not in common for word in words), len(words))


def _readability(story: CardStory) -> float:
    import textstat

    # Its other indices count syllables with a dictionary that it downloads.
    return textstat.automated_readability_index(story.text) if split_words(story.text) else math.nan


def _has_dialogue(story: CardStory) -> float:
    return float(bool(quoted_parts(story.text))) if split_words(story.text) else math.nan


def _hero_returns(story: CardStory) -> float:
    name = introduced_name(story.text)
    if name is None:
        return math.nan
    return float(len(names_with_positions(story.text).get(name, ())) > 1)


def _has_late_name(story: CardStory) -> float:
    names = names_with_positions(story.text)
    if not names:
        return math.nan
    late = len(split_words(story.text)) * 2 / 3
    return float(any(found[0] >= late for found in names.values()))


def _distinct(size: int) -> Callable[[Sequence[CardStory]], float]:
    def of_group(group: Sequence[CardStory]) -> float:
        ngrams = []
        for story in group:
            words = split_words(story.text)[:_DISTINCT_WORDS]
            ngrams += zip(*(words[start:] for start in range(size)), strict=False)
        return _share(len(set(ngrams)), len(ngrams))

    return of_group


def _self_bleu(group: Sequence[CardStory]) -> float:
    """Return the mean BLEU (0 to 1) of each story against the others of the group."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    texts = [story.text for story in group if split_words(story.text)]
    if len(texts) < 2:
        return math.nan
    scores = [
        bleu.sentence_score(text, texts[:at] + texts[at + 1 :]).score / 100 for at, text in enumerate(texts)
    ]
    return math.fsum(scores) / len(scores)


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="ended",
        title="Ends by itself",
        definition="Share of stories that the model ends before the length limit or the end of its context.",
        of_story=lambda story: float(story.ended),
    ),
    Measure(
        name="words",
        title="Length",
        definition="Words of a story, prompt included.",
        of_story=lambda story: float(len(split_words(story.text))),
        format="number",
    ),
    Measure(
        name="words_per_sentence",
        title="Words per sentence",
        definition="Words of a story divided by its sentences.",
        of_story=_words_per_sentence,
        format="number",
    ),
    *(
        Measure(
            name=f"distinct_{size}",
            title=f"Distinct {size}-grams",
            definition=f"Different sequences of {size} word{'s' * (size > 1)} divided by all of them, in the "
            f"first {_DISTINCT_WORDS} words of ten stories; higher is more diverse.",
            of_group=_distinct(size),
        )
        for size in (1, 2, 3)
    ),
    Measure(
        name="self_bleu",
        title="Self-BLEU",
        definition="BLEU (sacrebleu, 0 to 1) of a story against nine others; lower is more diverse.",
        of_group=_self_bleu,
        format="number",
    ),
    Measure(
        name="repetition",
        title="Repetition inside a story",
        definition="Share of a story's sequences of four words that occurred earlier in the same story.",
        of_story=_repetition,
    ),
    Measure(
        name="repeated_sentence",
        title="A sentence twice",
        definition="Share of stories in which a whole sentence occurs more than once.",
        of_story=_repeats_a_sentence,
    ),
    Measure(
        name="unknown_words",
        title="Words that are no words",
        definition="Share of words that the English dictionary of pyspellchecker lacks, names left out.",
        of_story=_unknown_words,
    ),
    Measure(
        name="rare_words",
        title="Vocabulary level",
        definition=f"Share of words that are not among the {_NUM_COMMON_WORDS:,} most frequent ones of the "
        "dictionary, names left out; higher is a richer vocabulary.",
        of_story=_rare_words,
    ),
    Measure(
        name="readability",
        title="Reading grade",
        definition="Automated readability index (textstat): the US school grade by letters per word and "
        "words per sentence.",
        of_story=_readability,
        format="number",
    ),
    Measure(
        name="dialogue",
        title="Dialogue",
        definition="Share of stories with words between quotation marks.",
        of_story=_has_dialogue,
    ),
    Measure(
        name="quotations_closed",
        title="Quotation marks close",
        definition="Share of the stories with quotation marks in which each of them closes in its paragraph.",
        of_story=lambda story: _as_share(are_quotations_closed(story.text)),
    ),
    Measure(
        name="hero_returns",
        title="The hero keeps the name",
        definition="Of the stories that introduce someone as named X or called X, those that use X again.",
        of_story=_hero_returns,
    ),
    Measure(
        name="late_name",
        title="A new name near the end",
        definition="Share of the stories with names in which a name first occurs in the last third.",
        of_story=_has_late_name,
    ),
)
