"""The `report_card` command: generate stories, measure them, and write the page and the figures."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.training_data import read_training_data
from tinystories_slm.io.atomic import write_output
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.model_folder import ModelReference, load_model_folder, resolve_model, weights_sha256
from tinystories_slm.report_card.arena import bradley_terry, run_arena
from tinystories_slm.report_card.card_prompts import PROMPTS_VERSION, read_card_prompts
from tinystories_slm.report_card.display_names import display_names
from tinystories_slm.report_card.estimates import estimate_difference, estimate_mean
from tinystories_slm.report_card.grammar_check import entropy_distances
from tinystories_slm.report_card.judge_cache import AnswerCache
from tinystories_slm.report_card.judging import load_judge
from tinystories_slm.report_card.page import render_page
from tinystories_slm.report_card.sections import (
    MeasuredValues,
    StorySet,
    check_grammar,
    collect_marks,
    judging_plan,
    measure_copies,
    measure_texts,
)
from tinystories_slm.report_card.story_sets import HeldOut, generate_stories, select_held_out
from tinystories_slm.report_card.text import split_words

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Version of the JSON file."""
HELD_OUT = "held-out stories"


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
    sets, held_out = _generate_sets(args)
    if args.arena:
        return _arena(args, sets)
    if args.judge_estimate:
        estimate = judging_plan(args, sets).estimate(
            load_judge(args).name, AnswerCache(args.judge_cache_path)
        )
        print(f"judge {args.judge}: {estimate}")
        return {"judge_estimate": asdict(estimate)}
    card = _card(args, sets, held_out)
    if args.judge is not None:
        _add_judge(card, args, sets)
    _write(card, args.output)
    return card


def _generate_sets(args: ReportCardArgs) -> tuple[list[StorySet], HeldOut]:
    """Return the stories of each model, those that were held out as the last set, and their origin."""
    models = [args.model, *args.baseline]
    sets: list[StorySet] = []
    held_out: HeldOut | None = None
    for name, model_id in zip(display_names(models, option="baseline"), models, strict=True):
        reference = resolve_model(model_id, args.model_revision if held_out is None else None)
        model, tokenizer = _load(reference, args)
        if held_out is None:
            held_out = select_held_out(args, read_training_data(reference.name, model.config))
        logger.info("generate %d stories with %s", args.num_stories, model_id)
        facts = {
            "id": name,
            "revision": getattr(model.config, "_commit_hash", None),
            "weights_sha256": weights_sha256(expand_user(reference.name)),
            "num_parameters": model.num_parameters(),
        }
        stories = generate_stories(model, tokenizer, model_id, args)
        sets.append(StorySet(name=name, stories=stories, model=facts))
        if held_out.is_builtin_corpus:
            sets[-1].entropy_distances = entropy_distances(
                model, tokenizer, held_out.selection.texts, batch_size=args.batch_size
            )
    sets.append(StorySet(name=HELD_OUT, stories=held_out.stories))
    if held_out.is_builtin_corpus:
        sets[-1].entropy_distances = np.zeros(len(held_out.stories))
    return sets, held_out


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


def _load(reference: ModelReference, args: ReportCardArgs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, revision = reference
    return load_model_folder(
        model, revision=revision, trust_remote_code=args.trust_remote_code, device=args.device
    )


def _require_packages(*modules: str) -> None:
    for module in dict.fromkeys(modules):
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(f"{module} is not installed; pip install 'tinystories_slm[report]'") from error


def _card(args: ReportCardArgs, sets: list[StorySet], held_out: HeldOut) -> dict[str, Any]:
    """Return the contents of the JSON file, from which the page is rendered."""
    measured = measure_texts(sets)
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
        values, card["grammar"] = check_grammar(sets)
        measured += values
    if args.memorization:
        logger.info("compare %d stories with every training story", sum(len(one.stories) for one in sets))
        values, card["memorization"] = measure_copies(sets, held_out)
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


def _add_judge(card: dict[str, Any], args: ReportCardArgs, sets: Sequence[StorySet]) -> None:
    """Add the marks of the judge; if there are none, write the card without them and raise the error."""
    try:
        measured, card["judge"] = collect_marks(args, sets)
    except BaseException:
        _write(card, args.output)
        raise
    card["measures"] += [_summarize(one, sets) for one in measured]


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
