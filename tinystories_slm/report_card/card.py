"""The `report_card` command: generate stories, measure them, and write the page and the figures."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.command_args import ReportCardArgs
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.training_data import read_training_data
from tinystories_slm.io.atomic import write_output
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.model_folder import load_model_folder, weights_sha256
from tinystories_slm.report_card.arena import bradley_terry, run_arena
from tinystories_slm.report_card.bootstrap import estimate_difference, estimate_mean
from tinystories_slm.report_card.grammar_check import (
    accepted_shares,
    correct_shares,
    count_breaks,
    diagnose_stories,
    distances_by_plot,
    entropy_distances,
    shares_by_plot,
)
from tinystories_slm.report_card.judge import load_judge
from tinystories_slm.report_card.judge_cache import AnswerCache
from tinystories_slm.report_card.judging import JudgingPlan, judge_stories
from tinystories_slm.report_card.measures import MEASURES, CardStory
from tinystories_slm.report_card.memorization import find_copies
from tinystories_slm.report_card.page import render_page
from tinystories_slm.report_card.story_sets import (
    PROMPTS_VERSION,
    HeldOut,
    generate_stories,
    iter_training_stories,
    read_card_prompts,
    select_held_out,
)
from tinystories_slm.report_card.text import split_words

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Version of the JSON file."""
HELD_OUT = "held-out stories"
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
    format: str
    values: list[np.ndarray]


def report_card(args: ReportCardArgs) -> dict[str, Any]:
    """Write the report card of `args.model` and print its path; return the contents of the JSON file.

    Raises:
        UserError: a package is missing, or a model, the data or the split cannot be found or read.
    """
    _require_packages(
        *("sacrebleu", "spellchecker", "textstat"),
        *["rapidfuzz"] * args.memorization,
        *["openai"] * (args.judge_url is not None),
    )
    names = _display_names([args.model, *args.baseline])
    sets: list[StorySet] = []
    held_out: HeldOut | None = None
    for name, model_id in zip(names, [args.model, *args.baseline], strict=True):
        model, tokenizer = _load(model_id, args)
        if held_out is None:
            held_out = select_held_out(args, read_training_data(args.model, model.config))
        logger.info("generate %d stories with %s", args.num_stories, model_id)
        texts = held_out.selection.texts
        sets.append(
            StorySet(
                name=name,
                stories=generate_stories(model, tokenizer, model_id, args),
                model={
                    "id": name,
                    "revision": getattr(model.config, "_commit_hash", None),
                    "weights_sha256": weights_sha256(expand_user(model_id)),
                    "num_parameters": model.num_parameters(),
                },
                entropy_distances=entropy_distances(model, tokenizer, texts, batch_size=args.batch_size)
                if held_out.is_builtin_corpus
                else None,
            )
        )
    zeros = np.zeros(len(held_out.stories)) if held_out.is_builtin_corpus else None
    sets.append(StorySet(name=HELD_OUT, stories=held_out.stories, entropy_distances=zeros))
    if args.arena:
        return _arena(args, sets)
    if args.judge_estimate:
        estimate = _plan(args, sets).estimate(load_judge(args).name, AnswerCache(args.judge_cache_path))
        print(f"judge {args.judge}: {estimate}")
        return {"judge_estimate": asdict(estimate)}
    card = _card(args, sets, held_out)
    if args.judge is not None:
        _add_judge(card, args, sets)
    _write(card, args.output)
    return card


def _arena(args: ReportCardArgs, sets: Sequence[StorySet]) -> dict[str, Any]:
    """Compare the sets in the terminal and print the estimate from all votes."""
    path = args.output.with_suffix(".votes.jsonl")
    texts = [(one.name, [story.text for story in one.stories]) for one in sets]
    votes = run_arena(texts, path, seed=args.seed)
    found = bradley_terry(votes)
    print(f"\n{len(votes)} votes in {path}; share won against an average opponent, 95% interval:")
    for name, one in sorted(found.items(), key=lambda item: -item[1]["value"]):
        print(f"{one['value']:6.1%} ({one['low']:.1%} to {one['high']:.1%}, {one['count']} votes)  {name}")
    return {"arena": found}


def _load(model: str, args: ReportCardArgs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model_folder(model, trust_remote_code=args.trust_remote_code, device=args.device)


def _require_packages(*modules: str) -> None:
    for module in dict.fromkeys(modules):
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(f"{module} is not installed; pip install 'tinystories_slm[report]'") from error


def _display_names(models: Sequence[str]) -> list[str]:
    """Return a name for each model, without a path of this machine: the page may be shared.

    Raises:
        UserError: a model is given twice.
    """
    if len(set(models)) < len(models):
        raise UserError(f"baseline ({models[-1]}): must differ from the other models; remove it")
    names = []
    for model in models:
        path = Path(model)
        name = "/".join(path.resolve().parts[-2:]) if path.exists() else model
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _card(args: ReportCardArgs, sets: list[StorySet], held_out: HeldOut) -> dict[str, Any]:
    """Return the contents of the JSON file, from which the page is rendered."""
    measured = _measure_texts(sets)
    card: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "prompts_version": PROMPTS_VERSION,
        "prompts": list(read_card_prompts()),
        "sampling": asdict(args.sampling()),
        "seed": args.seed,
        "data": {
            "source": held_out.public_name,
            "subset": held_out.subset,
            "revision": held_out.revision,
            **held_out.selection.record(),
        },
        "sets": [_describe(one) for one in sets],
    }
    if held_out.is_builtin_corpus:
        values, card["grammar"] = _check_grammar(sets)
        measured += values
    if args.memorization:
        logger.info("compare %d stories with every training story", sum(len(one.stories) for one in sets))
        values, card["memorization"] = _measure_copies(sets, held_out)
        measured += values
    card["measures"] = [_summarize(one, sets) for one in measured]
    return card


def _describe(one: StorySet) -> dict[str, Any]:
    """Return the facts and stories of a set; a story without a word has no value in most measures."""
    return {
        "name": one.name,
        "model": one.model or None,
        "num_stories": len(one.stories),
        "num_stories_without_words": sum(not split_words(story.text) for story in one.stories),
        "num_stories_of_one_word": sum(len(split_words(story.text)) == 1 for story in one.stories),
        "stories": [asdict(story) for story in one.stories],
    }


def _measure_texts(sets: Sequence[StorySet]) -> list[MeasuredValues]:
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


def _check_grammar(sets: Sequence[StorySet]) -> tuple[list[MeasuredValues], dict[str, Any]]:
    """Return the measures of the built-in corpus, and the broken constraints and the plots of each set."""
    section = "Built-in corpus"
    found = [diagnose_stories(one.stories) for one in sets]
    measured = [
        MeasuredValues(
            section=section,
            name="grammar_accepted",
            title="Accepted by the grammar",
            definition="Share of stories that the grammar of the built-in corpus accepts as a whole.",
            format="share",
            values=[accepted_shares(one) for one in found],
        ),
        MeasuredValues(
            section=section,
            name="grammar_correct",
            title="Text before the first break",
            definition="Share of a story's characters before the first place where it leaves the grammar.",
            format="share",
            values=[correct_shares(one.stories, own) for one, own in zip(sets, found, strict=True)],
        ),
        MeasuredValues(
            section=section,
            name="entropy_distance",
            title="Distance of the loss from the entropy",
            definition="Nats per token of a held-out story under the model minus those under the "
            "grammar, whose own distance is 0.",
            format="number",
            values=[one.entropy_distances for one in sets],
        ),
    ]
    return measured, {
        one.name: {
            "breaks": count_breaks(own),
            "by_plot": shares_by_plot(own),
            "entropy_distance_by_plot": distances_by_plot(found[-1], one.entropy_distances),
        }
        for one, own in zip(sets, found, strict=True)
    }


def _measure_copies(
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

    def values(of_copy: Callable[[Any], float]) -> list[np.ndarray]:
        return [np.array([of_copy(copy) for copy in part if copy.num_words], dtype=float) for part in parts]

    examples = []
    for one, part in zip(sets, parts, strict=True):
        longest = sorted(part, key=lambda copy: -copy.run)[:_NUM_EXAMPLES]
        examples += [
            {
                "set": one.name,
                "num_words": copy.num_words,
                "run": copy.run,
                "run_words": " ".join(copy.run_words),
                "training_story": copy.run_story,
            }
            for copy in longest
            if copy.run
        ]
    section = "Memorization"
    measured = [
        MeasuredValues(
            section=section,
            name="longest_run",
            title="Longest copied run",
            definition="Words of the longest run of a story that also stands in a training story.",
            format="number",
            values=values(lambda copy: copy.run),
        ),
        MeasuredValues(
            section=section,
            name="run_share",
            title="Copied share",
            definition="Longest copied run divided by the words of the story; 100% is a copy.",
            format="share",
            values=values(lambda copy: copy.run_share),
        ),
        MeasuredValues(
            section=section,
            name="rouge_l",
            title="ROUGE-L to the nearest training story",
            definition="F1 of the longest common subsequence of words, with the training story where it is "
            "largest.",
            format="number",
            values=values(lambda copy: copy.rouge_l),
        ),
    ]
    return measured, {
        "num_training_stories": num_training,
        "is_recorded": held_out.trained_on is not None,
        "examples": examples,
    }


def _plan(args: ReportCardArgs, sets: Sequence[StorySet]) -> JudgingPlan:
    texts = [(one.name, [story.text for story in one.stories[: args.judge_stories]]) for one in sets]
    return JudgingPlan(sets=texts, num_repeats=args.judge_repeats)


def _add_judge(card: dict[str, Any], args: ReportCardArgs, sets: Sequence[StorySet]) -> None:
    """Add the marks of the judge; if there are none, write the card without them and raise the error."""
    try:
        measured, card["judge"] = _judge(args, sets)
    except BaseException:
        _write(card, args.output)
        raise
    card["measures"] += [_summarize(one, sets) for one in measured]


def _judge(args: ReportCardArgs, sets: Sequence[StorySet]) -> tuple[list[MeasuredValues], dict[str, Any]]:
    """Return the marks, and what the judge is worth."""
    plan, judge, cache = _plan(args, sets), load_judge(args), AnswerCache(args.judge_cache_path)
    with cache.locked():
        logger.info("judge %s: %s", judge.name, plan.estimate(judge.name, cache))
        found = judge_stories(plan, judge, cache, requests_per_minute=args.judge_requests_per_minute)
    titles = {
        "grammar": "Grammar and spelling, from 1 to 10.",
        "creativity": "Ideas of the story, from 1 to 10.",
        "consistency": "How well names, things and events fit together, from 1 to 10.",
        "plot": "Whether the story makes sense and has a beginning, a middle and an end, from 1 to 10.",
        "age": "Age in years of a student who would write the story, as the judge guesses it.",
    }
    measured = [
        MeasuredValues(
            section="Judge",
            name=f"judge_{name}",
            title=name.capitalize(),
            definition=definition,
            format="number",
            values=[marks[name] for marks in found.marks],
        )
        for name, definition in titles.items()
    ]
    return measured, found.record


def _summarize(measured: MeasuredValues, sets: Sequence[StorySet]) -> dict[str, Any]:
    """Return the estimates of a measure by set, each with its difference from the held-out stories."""
    reference = measured.values[-1]
    by_set: dict[str, Any] = {}
    for one, values in zip(sets, measured.values, strict=True):
        estimate = estimate_mean(values)
        if estimate is None:
            by_set[one.name] = None
            continue
        difference = None if one is sets[-1] else estimate_difference(values, reference)
        by_set[one.name] = asdict(estimate) | {"difference": difference and asdict(difference)}
    return {
        "section": measured.section,
        "name": measured.name,
        "title": measured.title,
        "definition": measured.definition,
        "format": measured.format,
        "by_set": by_set,
    }


def _write(card: dict[str, Any], output: Path) -> None:
    """Write the JSON file and the page, and print their paths."""
    figures = output.with_suffix(".json")
    write_output(figures, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    write_output(output, render_page(card))
    print(figures, output, sep="\n")
