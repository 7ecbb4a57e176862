"""The `evaluate` command: scores of a model on any stories, with the corpus entropy where it is known."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm import grammar
from tinystories_slm.config import DataArgs, load_config
from tinystories_slm.config.command_args import EvaluateArgs
from tinystories_slm.data.sources import is_on_hub, load_stories, resolve_revision
from tinystories_slm.data.tokenizer import count_lost_bytes, encode_stories
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.evaluation.metric import StoryLikelihood
from tinystories_slm.model_folder import load_model_folder
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
    model, tokenizer = load_model_folder(
        args.model,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
    )
    logger.info(
        "evaluate model %s on %s, data %s (split %s)", args.model, model.device, args.data, args.split
    )
    revision = resolve_revision(args.data, args.revision)
    validation_split, validation_fraction = _holdout_of_run(args)
    dataset = load_stories(
        args.data,
        args.split,
        text_column=args.text_column,
        revision=revision if is_on_hub(args.data) else None,
        validation_split=validation_split if args.split == "validation" else None,
        validation_fraction=validation_fraction,
    )
    texts = dataset[: args.max_stories]["text"] if args.max_stories else dataset["text"][:]
    result = score_texts(
        model,
        tokenizer,
        texts,
        batch_size=args.batch_size,
        is_builtin_corpus=args.data == "builtin",
        progress=True,
    )
    result |= {
        "model": args.model,
        "model_revision": args.model_revision,
        "data": args.data,
        "revision": revision,
        "split": args.split,
        "protocol": PROTOCOL,
    }
    print(format_scores(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        logger.info("wrote the scores to %s", args.output)
    return result


def _holdout_of_run(args: EvaluateArgs) -> tuple[Literal["auto", "holdout"], float]:
    """Return the validation split and fraction of the options, else of the run that trained the model.

    With another fraction than in that run, training stories would be scored as validation.
    """
    run_config = Path(args.model).parent / "config.yaml"
    data = load_config(run_config).data if run_config.is_file() else DataArgs()
    return (
        args.validation_split or data.validation_split,
        args.validation_fraction or data.validation_fraction,
    )


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
            f"scored         {scores['num_stories']:,} stories, {scores['num_tokens']:,} tokens, "
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
