"""The `evaluate` command: scores of a model on any stories, with the corpus entropy where it is known."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm import grammar
from tinystories_slm.config.command_args import EvaluateArgs
from tinystories_slm.data.mixture import MixtureSource
from tinystories_slm.data.source_registry import find_source
from tinystories_slm.data.sources import resolve_revision
from tinystories_slm.data.tokenizer import count_lost_bytes, encode_stories
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.evaluation.metric import StoryLikelihood
from tinystories_slm.evaluation.selection import StorySelection, select_stories
from tinystories_slm.evaluation.tasks import EvalContext, parse_task_names, run_tasks
from tinystories_slm.evaluation.training_data import read_training_data
from tinystories_slm.io.atomic import write_output
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.model_folder import load_model_folder, weights_sha256
from tinystories_slm.text_boundaries import text_boundaries

logger = logging.getLogger(__name__)

PROTOCOL = (
    "each story separately, between the model's start and end tokens; every token after the start scored "
    "once; stories longer than the context in windows that overlap by half; float32; sums, divided once"
)


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Score `args.model` on `args.data`, print the scores, and write them to `args.output`.

    Raises:
        UserError: the model, the data or the split cannot be found or read.
    """
    tasks = parse_task_names(args.tasks, "tasks")
    if isinstance(find_source(args.data), MixtureSource):
        raise UserError(f"data ({args.data}): a mixture cannot be scored; set --data to one of its parts")
    model, tokenizer = load_model_folder(
        args.model,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
    )
    logger.info(
        "evaluate model %s on %s, data %s (split %s)", args.model, model.device, args.data, args.split
    )
    revision = resolve_revision(args.data, args.revision, args.subset)
    selection = select_stories(args, revision, read_training_data(args.model, model.config))
    _log_training_stories(args.model, selection)
    result = score_texts(
        model,
        tokenizer,
        selection.texts,
        batch_size=args.batch_size,
        is_builtin_corpus=find_source(args.data).is_builtin_corpus,
        progress=True,
    )
    result |= {
        "model": args.model,
        "model_revision": getattr(model.config, "_commit_hash", None) or args.model_revision,
        "weights_sha256": weights_sha256(expand_user(args.model)),
        "data": args.data,
        "revision": revision,
        "subset": args.subset,
        **selection.record(),
        "protocol": PROTOCOL,
    }
    task_results = run_tasks(tasks, EvalContext(model=model, tokenizer=tokenizer, held_out=selection.texts))
    if task_results:
        result["tasks"] = [asdict(task_result) for task_result in task_results]
    if args.output:
        write_scores(result, args.output)
        logger.info("wrote the scores to %s", args.output)
    print("\n".join([format_scores(result), *map(str, task_results)]))
    return result


def write_scores(scores: dict[str, Any], path: Path) -> None:
    """Write the scores as JSON; `path` is complete or as it was, even if the program is killed."""
    write_output(path, json.dumps(scores, indent=2) + "\n")


def _log_training_stories(model: str, selection: StorySelection) -> None:
    if selection.num_training_stories is None:
        logger.info("%s has no record of its training data, which may include these stories", model)
    elif selection.num_training_stories:
        logger.warning(
            "%s was trained on %s of the %s stories: these are not scores of held-out text",
            model, f"{selection.num_training_stories:,}", f"{len(selection.texts):,}",
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
    """Return the scores of `model` on `texts`, by the protocol in `evaluation.likelihood`.

    With `is_builtin_corpus` (texts of the built-in corpus) the scores include `entropy` and
    `entropy_bits_per_byte`: the negative log-probability of the same texts under the grammar. No model can
    score below it on average. If the tokenizer loses text, `lost_bytes` and `num_lossy_stories` replace
    `bits_per_byte`.
    """
    boundaries, ids = text_boundaries(model, tokenizer), encode_stories(tokenizer, texts)
    scores = score_stories(
        model,
        ids,
        eos_token_id=boundaries.end_id,
        start_ids=boundaries.context_ids,
        batch_size=batch_size,
        progress=progress,
    )
    metric = StoryLikelihood(keep_in_memory=True)
    num_bytes = [len(text.encode("utf-8")) for text in texts]
    metric.add_batch(
        nats=scores.nats, num_correct=scores.num_correct, num_tokens=scores.num_tokens, num_bytes=num_bytes
    )
    result = metric.compute()
    if any(lost_bytes := count_lost_bytes(tokenizer, texts, ids)):
        del result["bits_per_byte"]  # the model has not seen these bytes
        result |= {"lost_bytes": sum(lost_bytes), "num_lossy_stories": sum(map(bool, lost_bytes))}
    if is_builtin_corpus:
        nats = -math.fsum(grammar.log_prob(text) for text in texts)
        result["entropy"] = nats / result["num_tokens"]
        result["entropy_bits_per_byte"] = nats / math.log(2) / result["num_bytes"]
    return result


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
            f"scored         {_format_num_stories(scores)}, {scores['num_tokens']:,} tokens, "
            f"{scores['num_bytes']:,} bytes",
        ]
    )


def _format_num_stories(scores: dict[str, Any]) -> str:
    """Return how many stories were scored, of how many, and how many of them the model was trained on."""
    if "num_split_stories" not in scores:  # of an earlier version
        return f"{scores['num_stories']:,} stories"
    text = f"{scores['num_stories']:,} of {scores['num_split_stories']:,} stories"
    if scores["num_source_stories"] > scores["num_split_stories"]:
        text += f" held out of {scores['num_source_stories']:,}"
    if scores["num_training_stories"]:
        text += f" ({scores['num_training_stories']:,} trained on)"
    return text


def _format_bits_per_byte(scores: dict[str, Any]) -> str:
    if "bits_per_byte" in scores:
        return f"{scores['bits_per_byte']:.4f}"
    share = scores["lost_bytes"] / scores["num_bytes"]
    return (
        f"undefined: the tokenizer loses {share:.1%} of the bytes, in {scores['num_lossy_stories']:,} of "
        f"{scores['num_stories']:,} stories"
    )
