"""Sections of a report card: the values of each measure in every set of stories, and what belongs to them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.report_card.grammar_check import (
    accepted_shares,
    correct_shares,
    count_breaks,
    diagnose_stories,
    distances_by_plot,
    shares_by_plot,
)
from tinystories_slm.report_card.judge_cache import AnswerCache
from tinystories_slm.report_card.judging import JudgingPlan, judge_stories, load_judge
from tinystories_slm.report_card.measures import MEASURES, CardStory, Format
from tinystories_slm.report_card.memorization import Copy, find_copies
from tinystories_slm.report_card.story_sets import HeldOut, iter_training_stories

logger = logging.getLogger(__name__)

_NUM_EXAMPLES = 3


@dataclass(kw_only=True)
class StorySet:
    """Stories of one model, or the held-out ones."""

    name: str
    stories: list[CardStory]
    model: dict[str, Any] = field(default_factory=dict)
    """Facts of the model; empty for held-out stories."""
    entropy_distances: np.ndarray | None = None
    """Nats per token beyond the entropy, of each held-out story; None for other data than `builtin`."""


@dataclass(frozen=True, kw_only=True)
class MeasuredValues:
    """A measure and its values in every set, in the order of the sets."""

    section: str
    name: str
    title: str
    definition: str
    format: Format
    values: list[np.ndarray]


@dataclass(frozen=True)
class _Figure:
    """Texts of a measure that is not of `MEASURES`."""

    section: str
    name: str
    title: str
    definition: str
    format: Format = "number"

    def with_values(self, values: list[np.ndarray]) -> MeasuredValues:
        return MeasuredValues(**vars(self), values=values)


_GRAMMAR = "Built-in corpus"
_ACCEPTED = _Figure(
    _GRAMMAR,
    "grammar_accepted",
    "Accepted by the grammar",
    "Share of stories that the grammar of the built-in corpus accepts as a whole.",
    "share",
)
_CORRECT = _Figure(
    _GRAMMAR,
    "grammar_correct",
    "Text before the first break",
    "Share of a story's characters before the first place where it leaves the grammar.",
    "share",
)
_DISTANCE = _Figure(
    _GRAMMAR,
    "entropy_distance",
    "Distance of the loss from the entropy",
    "Nats per token of a held-out story under the model minus those under the grammar, whose own is 0.",
)
_MEMORIZATION = "Memorization"
_COPIES: tuple[tuple[_Figure, Callable[[Copy], float]], ...] = (
    (
        _Figure(
            _MEMORIZATION,
            "longest_run",
            "Longest copied run",
            "Words of the longest run of a story, prompt included, that also stands in a training story.",
        ),
        lambda copy: copy.run,
    ),
    (
        _Figure(
            _MEMORIZATION,
            "run_share",
            "Copied share",
            "Longest copied run divided by the words of the story; 100% is a copy.",
            "share",
        ),
        lambda copy: copy.run_share,
    ),
    (
        _Figure(
            _MEMORIZATION,
            "rouge_l",
            "ROUGE-L",
            "F1 of the longest common subsequence of words, with the training story where it is largest.",
        ),
        lambda copy: copy.rouge_l,
    ),
)
_MARKS = {
    "grammar": "Grammar and spelling, from 1 to 10.",
    "creativity": "Ideas of the story, from 1 to 10.",
    "consistency": "How well names, things and events fit together, from 1 to 10.",
    "plot": "Whether the story makes sense and has a beginning, a middle and an end, from 1 to 10.",
    "age": "Age in years of a student who would write the story, as the judge guesses it.",
}


def measure_names() -> list[str]:
    """Return the name of every measure that a card may have."""
    figures = [_ACCEPTED, _CORRECT, _DISTANCE, *(figure for figure, _ in _COPIES)]
    names = [one.name for one in (*MEASURES, *figures)]
    return names + [f"judge_{name}" for name in _MARKS]


def measure_texts(sets: Sequence[StorySet]) -> list[MeasuredValues]:
    """Return the measures of `MEASURES`."""
    return [
        MeasuredValues(
            section="Stories",
            name=measure.name,
            title=measure.title,
            definition=measure.definition,
            format=measure.format,
            values=[measure.values(one.stories) for one in sets],
        )
        for measure in MEASURES
    ]


def check_grammar(sets: Sequence[StorySet]) -> tuple[list[MeasuredValues], dict[str, Any]]:
    """Return the measures of the built-in corpus, and the broken constraints and the plots of each set."""
    found = [diagnose_stories(one.stories) for one in sets]
    correct = [correct_shares(one.stories, own) for one, own in zip(sets, found, strict=True)]
    measured = [
        _ACCEPTED.with_values([accepted_shares(one) for one in found]),
        _CORRECT.with_values(correct),
        _DISTANCE.with_values([one.entropy_distances for one in sets]),
    ]
    return measured, {
        one.name: {
            "breaks": count_breaks(own),
            "by_plot": shares_by_plot(own),
            "entropy_distance_by_plot": distances_by_plot(found[-1], one.entropy_distances),
        }
        for one, own in zip(sets, found, strict=True)
    }


def measure_copies(
    sets: Sequence[StorySet], held_out: HeldOut
) -> tuple[list[MeasuredValues], dict[str, Any]]:
    """Return the measures of memorization, and the training stories read with the longest copies."""
    texts = [story.text for one in sets for story in one.stories]
    copies, num_training = find_copies(texts, iter_training_stories(held_out))
    if not num_training:
        logger.warning("%s has no training split: memorization is not measured", held_out.source)
        return [], {"num_training_stories": 0, "is_recorded": False, "examples": []}
    ends = np.cumsum([0, *(len(one.stories) for one in sets)])
    parts = [copies[start:end] for start, end in pairwise(ends)]
    measured = [
        figure.with_values(
            [np.array([of_copy(copy) for copy in part if copy.num_words], dtype=float) for part in parts]
        )
        for figure, of_copy in _COPIES
    ]
    return measured, {
        "num_training_stories": num_training,
        "is_recorded": held_out.trained_on is not None,
        "examples": [one for own, part in zip(sets, parts, strict=True) for one in _examples(own.name, part)],
    }


def _examples(name: str, copies: Sequence[Copy]) -> list[dict[str, Any]]:
    """Return the longest copied runs of a set."""
    return [
        {
            "set": name,
            "num_words": copy.num_words,
            "run": copy.run,
            "run_words": " ".join(copy.run_words),
            "training_story": copy.run_story,
        }
        for copy in sorted(copies, key=lambda copy: -copy.run)[:_NUM_EXAMPLES]
        if copy.run
    ]


def judging_plan(args: ReportCardArgs, sets: Sequence[StorySet]) -> JudgingPlan:
    """Return the requests of the judge."""
    texts = [(one.name, [story.text for story in one.stories[: args.judge_stories]]) for one in sets]
    return JudgingPlan(sets=texts, num_repeats=args.judge_repeats)


def collect_marks(
    args: ReportCardArgs, sets: Sequence[StorySet]
) -> tuple[list[MeasuredValues], dict[str, Any]]:
    """Return the marks, and what the judge is worth.

    Raises:
        UserError: the judge gives no answer, or another process uses its cache.
    """
    plan, judge, cache = judging_plan(args, sets), load_judge(args), AnswerCache(args.judge_cache_path)
    with cache.locked():
        logger.info("judge %s: %s", judge.name, plan.estimate(judge.name, cache))
        found = judge_stories(plan, judge, cache, requests_per_minute=args.judge_requests_per_minute)
    measured = [
        _Figure("Judge", f"judge_{name}", name.capitalize(), definition).with_values(
            [marks[name] for marks in found.marks]
        )
        for name, definition in _MARKS.items()
    ]
    return measured, found.record
