"""Marks and comparisons of a judge, with what they are worth: agreement, order bias and planted faults."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.report_card.estimates import estimate_mean
from tinystories_slm.report_card.judge import EndpointJudge, Judge
from tinystories_slm.report_card.judge_cache import (
    AnswerCache,
    CostEstimate,
    collect_answers,
    estimate_cost,
)
from tinystories_slm.report_card.judge_prompts import (
    AGE_GROUPS,
    MARKS,
    JudgeRequest,
    Marks,
    mark_request,
    pair_request,
    read_choice,
    read_marks,
)
from tinystories_slm.report_card.judge_prompts import PROMPTS_VERSION as JUDGE_PROMPTS_VERSION
from tinystories_slm.report_card.local_judge import LocalJudge
from tinystories_slm.report_card.planted import VERSION as PLANTED_VERSION
from tinystories_slm.report_card.planted import planted_faults

logger = logging.getLogger(__name__)

_MAX_UNREADABLE = 0.5
_MAX_SAME_MARKS = 0.5
_GUESSED_FAULTS = 0.25
"""Share of planted faults that a judge finds who guesses: the right story in both orders."""


@dataclass(frozen=True, kw_only=True)
class JudgingPlan:
    """Every request of a card, in a fixed order.

    Sets are (name, texts); the first is the model of the card, which is compared with each other set.
    """

    sets: Sequence[tuple[str, Sequence[str]]]
    num_repeats: int

    def mark_requests(self) -> list[JudgeRequest]:
        """Return the requests of marks: set by set, story by story, repeat by repeat."""
        return [
            mark_request(text, repeat)
            for _, texts in self.sets
            for text in texts
            for repeat in range(self.num_repeats)
        ]

    def pair_requests(self) -> list[JudgeRequest]:
        """Return both orders of each pair of the first set with another set, then those of planted faults."""
        return [pair_request(*order) for one, other in self.pairs() for order in ((one, other), (other, one))]

    def pairs(self) -> list[tuple[str, str]]:
        """Return (own, other) of all comparisons, and (sound, faulty) of the planted faults."""
        _, own = self.sets[0]
        compared = [pair for _, texts in self.sets[1:] for pair in zip(own, texts, strict=False)]
        return compared + [(fault.sound, fault.faulty) for fault in planted_faults()]

    def requests(self) -> list[JudgeRequest]:
        """Return all requests."""
        return self.mark_requests() + self.pair_requests()

    def estimate(self, judge: str, cache: AnswerCache) -> CostEstimate:
        """Return what is left to pay for."""
        return estimate_cost(judge, self.requests(), cache)


@dataclass(frozen=True, kw_only=True)
class Judgments:
    """Results of a plan."""

    marks: list[dict[str, np.ndarray]]
    """Per set: values of each mark and of `age`, the mean over the repeats of each story with a mark."""
    record: dict[str, Any]
    """Contents of the JSON file: agreement, order bias, win rates, planted faults."""


def load_judge(args: ReportCardArgs) -> Judge:
    """Return the judge of `args`.

    Raises:
        UserError: the local model cannot be loaded.
    """
    return LocalJudge(args) if args.judge_url is None else EndpointJudge(args)


def judge_stories(
    plan: JudgingPlan, judge: Judge, cache: AnswerCache, *, requests_per_minute: int
) -> Judgments:
    """Collect every answer and return the marks and statistics.

    Raises:
        UserError: the judge gives no answer.
    """
    answers = collect_answers(judge, plan.requests(), cache, requests_per_minute=requests_per_minute)
    num_marks = len(plan.mark_requests())
    marks = [read_marks(answer) for answer in answers[:num_marks]]
    choices = [read_choice(answer) for answer in answers[num_marks:]]
    unreadable = sum(one is None for one in (*marks, *choices)) / len(answers)
    by_story = [marks[at : at + plan.num_repeats] for at in range(0, num_marks, plan.num_repeats)]
    by_set, start = [], 0
    for _, texts in plan.sets:
        by_set.append(_mean_marks(by_story[start : start + len(texts)]))
        start += len(texts)
    record = {
        "judge": judge.name,
        "prompts_version": JUDGE_PROMPTS_VERSION,
        "num_requests": len(answers),
        "unreadable": unreadable,
        "disagreement": _disagreement(by_story),
        "same_marks": _share_of_commonest([one.values for one in marks if one is not None]),
        **_compare(plan, choices),
    }
    record["problems"] = _problems(record)
    for problem in record["problems"]:
        logger.warning("judge %s is not reliable: %s", judge.name, problem)
    return Judgments(marks=by_set, record=record)


def _problems(record: dict[str, Any]) -> list[str]:
    """Return one clause for each reason why the figures of a judge state nothing about the stories."""
    problems = []
    if record["unreadable"] > _MAX_UNREADABLE:
        problems.append(f"{record['unreadable']:.0%} of the answers cannot be read")
    found = record["planted_found"]
    if found["low"] <= _GUESSED_FAULTS:
        num_found, count = round(found["value"] * found["count"]), found["count"]
        guessed = round(_GUESSED_FAULTS * count)
        problems.append(
            f"it finds {num_found} of {count} planted faults, and a judge that guesses finds about {guessed}"
        )
    if (same := record["same_marks"]) is not None and same > _MAX_SAME_MARKS:
        problems.append(f"{same:.0%} of its marks are the same four numbers, whatever the story")
    return problems


def _share_of_commonest(values: Sequence[tuple[float, ...]]) -> float | None:
    """Return the share of the most frequent value; None without values."""
    return Counter(values).most_common(1)[0][1] / len(values) if values else None


def _mean_marks(by_story: Sequence[Sequence[Marks | None]]) -> dict[str, np.ndarray]:
    """Return the mean over the repeats of each story; stories without a readable answer are left out."""
    readable = [[one for one in repeats if one is not None] for repeats in by_story]
    values = [np.mean([one.values for one in repeats], axis=0) for repeats in readable if repeats]
    ages = [[AGE_GROUPS[one.age_group] for one in repeats if one.age_group] for repeats in readable]
    by_mark = np.array(values).reshape(-1, len(MARKS)).T
    return dict(zip(MARKS, by_mark, strict=True)) | {"age": np.array([np.mean(one) for one in ages if one])}


def _disagreement(by_story: Sequence[Sequence[Marks | None]]) -> dict[str, Any] | None:
    """Return the mean difference of two judgments of one story, in points; None without repeats."""
    pairs = [repeats[:2] for repeats in by_story if len(repeats) > 1 and None not in repeats[:2]]
    differences = np.array([np.abs(np.subtract(one.values, other.values)).mean() for one, other in pairs])
    return _to_dict(differences)


def _compare(plan: JudgingPlan, choices: Sequence[str | None]) -> dict[str, Any]:
    """Return win rates, order bias and the planted faults that were found.

    Choices come in pairs: the story of interest first, then second.
    """
    both = list(zip(choices[::2], choices[1::2], strict=True))
    planted = planted_faults()
    compared, of_planted = both[: len(both) - len(planted)], both[len(both) - len(planted) :]
    win_rates, start = {}, 0
    for name, texts in plan.sets[1:]:
        length = min(len(texts), len(plan.sets[0][1]))
        win_rates[name] = _to_dict(_scores(compared[start : start + length]))
        start += length
    decided = [choice for pair in both for choice in pair if choice in ("A", "B")]
    readable = [pair for pair in both if None not in pair]
    found = [pair == ("A", "B") for pair in of_planted]
    kinds = dict.fromkeys(fault.kind for fault in planted)
    return {
        "win_rates": win_rates,
        "first_preferred": _to_dict(np.array([choice == "A" for choice in decided], dtype=float)),
        "same_in_both_orders": _to_dict(
            np.array([pair in (("A", "B"), ("B", "A"), ("tie", "tie")) for pair in readable], dtype=float)
        ),
        "planted_version": PLANTED_VERSION,
        "planted_found": _to_dict(np.array(found, dtype=float)),
        "planted_by_kind": {
            kind: [
                sum(hit for hit, fault in zip(found, planted, strict=True) if fault.kind == kind),
                sum(fault.kind == kind for fault in planted),
            ]
            for kind in kinds
        },
    }


def _scores(pairs: Sequence[tuple[str | None, str | None]]) -> np.ndarray:
    """Return the score of the own story in each pair: mean of both orders, 1 for better, 0.5 for a tie."""
    as_first = {"A": 1.0, "B": 0.0, "tie": 0.5}
    as_second = {"A": 0.0, "B": 1.0, "tie": 0.5}
    return np.array([(as_first[a] + as_second[b]) / 2 for a, b in pairs if a is not None and b is not None])


def _to_dict(values: np.ndarray) -> dict[str, Any] | None:
    estimate = estimate_mean(values)
    return estimate and vars(estimate)
