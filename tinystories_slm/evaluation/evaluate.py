"""The `evaluate` command: scores of models on any stories, with the corpus entropy where it is known."""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm import grammar
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.data.source_stories import resolve_revision
from tinystories_slm.data.sources.mixture import MixtureSource
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.comparison import compare_models
from tinystories_slm.evaluation.parameters import count_parameters
from tinystories_slm.evaluation.plot import plot_quality
from tinystories_slm.evaluation.scoring import ModelScores, score_model
from tinystories_slm.evaluation.selection import StorySelection, select_common_stories
from tinystories_slm.evaluation.table import bucket_lines, csv_table, format_stories, markdown_report
from tinystories_slm.evaluation.tasks import EvalContext, EvalResult, parse_task_names, run_tasks
from tinystories_slm.evaluation.training_data import read_training_data
from tinystories_slm.io.atomic import write_output
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.model_folder import load_model_folder, resolve_model, weights_sha256

logger = logging.getLogger(__name__)

PROTOCOL = (
    "each story separately, between the model's start and end tokens; every token after the start scored "
    "once; stories longer than the context in windows that overlap by half; float32; sums, divided once"
)
_PRECISION = {"int8": "float32 with int8 weights"}


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Score the models `args.model` on `args.data`, print the scores, and write them to `args.output`.

    Returns:
        The scores of one model; of several, the stories, and the scores of each model in `models`.

    Raises:
        UserError: a model, the data or the split cannot be found or read, or cannot be scored.
    """
    task_names = parse_task_names(args.tasks, "tasks")
    if isinstance(find_source(args.data), MixtureSource):
        raise UserError(f"data ({args.data}): a mixture cannot be scored; set --data to one of its parts")
    loaded = [_load(name, args, requires_eos=bool(task_names)) for name in args.models]
    revision = resolve_revision(args.data, args.revision, args.subset)
    trained_on = [
        read_training_data(resolve_model(name, args.model_revision).name, model.config)
        for name, (model, _) in zip(args.models, loaded, strict=True)
    ]
    selection = select_common_stories(args, revision, trained_on)
    results: list[dict[str, Any]] = []
    scores: list[ModelScores] = []
    for index, (model, tokenizer) in enumerate(loaded):
        _log_training_stories(args.models[index], selection, index)
        result, model_scores = _evaluate_model(args, index, model, tokenizer, selection, revision)
        context = EvalContext(model=model, tokenizer=tokenizer, held_out=selection.texts)
        task_results = run_tasks(task_names, context)
        if task_results:
            result["tasks"] = [asdict(task_result) for task_result in task_results]
        results.append(result)
        scores.append(model_scores)
    report = results[0] if len(results) == 1 else compare_models(results, scores)
    _write_outputs(args, report, results)
    lines = [_format_one(results[0]) if len(results) == 1 else markdown_report(results)]
    print("\n".join([*lines, *map(_format_tasks, results)]).rstrip())
    return report


def _load(
    name: str, args: EvaluateArgs, *, requires_eos: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model_folder(
        name,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=args.dtype,
        requires_eos=requires_eos,  # tasks generate stories up to it
    )


def _evaluate_model(
    args: EvaluateArgs,
    index: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    selection: StorySelection,
    revision: str,
) -> tuple[dict[str, Any], ModelScores]:
    """Return the scores of the model of this index as `evaluate` writes them, and those of each story."""
    name = args.models[index]
    logger.info("evaluate model %s on %s, data %s (split %s)", name, model.device, args.data, args.split)
    started = time.monotonic()
    scores = score_model(
        model,
        tokenizer,
        selection.texts,
        batch_size=args.batch_size,
        end_token=args.end_token,
        progress=True,
    )
    logger.info("scored %s stories in %.1f s", f"{len(selection.texts):,}", time.monotonic() - started)
    result = scores.metrics()
    if find_source(args.data).is_builtin_corpus:
        result |= _corpus_entropy(selection.texts, result)
    num_parameters, num_non_embedding = count_parameters(model)
    return result | {
        "model": name,
        "model_revision": getattr(model.config, "_commit_hash", None) or args.model_revision,
        "weights_sha256": weights_sha256(expand_user(resolve_model(name, args.model_revision).name)),
        "num_parameters": num_parameters,
        "num_non_embedding_parameters": num_non_embedding,
        "data": args.data,
        "revision": revision,
        "subset": args.subset,
        **selection.record(index),
        "protocol": PROTOCOL.replace("float32", _PRECISION.get(args.dtype, args.dtype)),
        "intervals": scores.intervals(),
        **scores.buckets(tokenizer, selection.texts),
    }, scores


def _write_outputs(args: EvaluateArgs, report: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    if args.output:
        writers = {".csv": lambda: csv_table(results), ".md": lambda: markdown_report(results) + "\n"}
        if writer := writers.get(args.output.suffix.lower()):
            write_output(args.output, writer())
        else:
            write_scores(report, args.output)
        logger.info("wrote the scores to %s", args.output)
    if args.plot:
        plot_quality(results, args.plot)
        logger.info("wrote the plot to %s", args.plot)


def write_scores(scores: dict[str, Any], path: Path) -> None:
    """Write the scores as JSON; `path` is complete or as it was, even if the program is killed."""
    write_output(path, json.dumps(scores, indent=2) + "\n")


def _log_training_stories(model: str, selection: StorySelection, index: int) -> None:
    num_trained = selection.num_training_by_model[index]
    if num_trained is None:
        logger.info("%s has no record of its training data, which may include these stories", model)
    elif num_trained:
        logger.warning(
            "%s was trained on %s of the %s stories: these are not scores of held-out text",
            model, f"{num_trained:,}", f"{len(selection.texts):,}",
        )  # fmt: skip


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int,
    is_builtin_corpus: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Return the metrics of `model` on `texts`, by the protocol in `evaluation.likelihood`.

    With `is_builtin_corpus` (texts of the built-in corpus) the metrics include `entropy` and
    `entropy_bits_per_byte`: the negative log-probability of the same texts under the grammar. No model can
    score below it on average. If the tokenizer loses text, `lost_bytes` and `num_lossy_stories` replace
    `bits_per_byte`.

    Raises:
        UserError: the texts cannot be scored (`score_model`).
    """
    result = score_model(model, tokenizer, texts, batch_size=batch_size, progress=progress).metrics()
    return result | (_corpus_entropy(texts, result) if is_builtin_corpus else {})


def _corpus_entropy(texts: Sequence[str], metrics: dict[str, Any]) -> dict[str, float]:
    """Return the negative log-probability of `texts` under the grammar, per token and in bits per byte."""
    nats = -math.fsum(grammar.log_prob(text) for text in texts)
    return {
        "entropy": nats / metrics["num_tokens"],
        "entropy_bits_per_byte": nats / math.log(2) / metrics["num_bytes"],
    }


def _format_one(scores: dict[str, Any]) -> str:
    """Return all that `evaluate` prints of one model."""
    lines = [format_scores(scores)]
    lines.append(f"stories        {scores['selection']}")
    lines.append(
        f"start, end     {scores['start'] or 'none'}, {scores['end'] or 'none'} ({scores['end_reason']})"
    )
    lines += _interval_lines(scores["intervals"])
    return "\n".join([*lines, *bucket_lines(scores)])


def _format_tasks(scores: dict[str, Any]) -> str:
    results = [EvalResult(**task) for task in scores.get("tasks", [])]
    return "\n".join([f"{scores['model']}:", *map(str, results)] if results else [])


def _interval_lines(intervals: dict[str, Any]) -> list[str]:
    known = {name: bounds for name, bounds in intervals.items() if bounds}
    parts = [f"{name.replace('_', ' ')} {low:.4f} to {high:.4f}" for name, (low, high) in known.items()]
    return [f"95% intervals  {', '.join(parts)}"] if parts else []


def format_scores(scores: dict[str, Any]) -> str:
    """Return the scores as lines of text."""
    entropy = entropy_bits = ""
    if "entropy" in scores:
        entropy = f"   (corpus entropy: {scores['entropy']:.4f})"
        entropy_bits = f"                  (corpus entropy: {scores['entropy_bits_per_byte']:.4f})"
    return "\n".join(
        [
            f"loss           {scores['loss']:.4f} nats per token{entropy}",
            f"bits per byte  {_format_bits_per_byte(scores)}{entropy_bits}",
            f"perplexity     {scores['perplexity']:.3f}",
            f"accuracy       {scores['accuracy']:.1%} of next tokens",
            f"scored         {format_stories(scores)}, {scores['num_tokens']:,} tokens, "
            f"{scores['num_bytes']:,} bytes",
        ]
    )


def _format_bits_per_byte(scores: dict[str, Any]) -> str:
    if "bits_per_byte" in scores:
        return f"{scores['bits_per_byte']:.4f}"
    share = scores["lost_bytes"] / scores["num_bytes"]
    return (
        f"undefined: the tokenizer loses {share:.1%} of the bytes, in {scores['num_lossy_stories']:,} of "
        f"{scores['num_stories']:,} stories"
    )
