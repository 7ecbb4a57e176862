"""A model's figures on the stories of any source, beside the source's own entropy where it is known."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config import DataArgs, load_config
from tinystories_slm.data import builtin
from tinystories_slm.data.sources import is_on_hub, load_stories, resolve_revision
from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.errors import InputError
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.evaluation.metric import StoryLikelihood
from tinystories_slm.model_folder import load_model_folder

logger = logging.getLogger(__name__)

PROTOCOL = (
    "each story alone as <|endoftext|> + ids + <|endoftext|>, every token after the first once; "
    "windows overlap by half past the context; float32; sums, then one division"
)


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Loss, perplexity, bits per byte and accuracy of a causal language model on stories."""

    model: str
    """Model folder (RUN/best) or Hub id of any causal language model."""
    data: str
    """`builtin`, a Hub dataset id, or a local file or folder (parquet, JSONL, text)."""
    split: str = "validation"
    """Split of the data; where it has no `validation`, that is cut from `train` (which is scored whole)."""
    batch_size: int = 32
    """Windows forwarded at once; changes speed and memory, not the figures."""
    max_stories: int | None = None
    """Stories scored, the first ones of the split; null for all."""
    output: Path | None = None
    """JSON file to write the figures to; null for none."""
    text_column: str = "text"
    """Column (parquet) or key (JSONL) that holds the story."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null for its newest commit."""
    validation: Literal["auto", "cut"] | None = None
    """As `data.validation` of a run; null for what the model's own run used, else `auto`."""
    validation_fraction: float | None = None
    """As `data.validation_fraction` of a run; null for what the model's own run used, else 0.05."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model; null for its newest commit."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model computes; auto takes cuda, else mps, else cpu."""
    trust_remote_code: bool = False
    """Run the code that a model brings along, if it is none of transformers' own classes."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_stories"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} ({value}) must be at least 1")
        if self.validation_fraction is not None and not 0.0 < self.validation_fraction < 1.0:
            raise InputError(
                f"validation_fraction ({self.validation_fraction}) must lie between 0 and 1; try 0.05"
            )
        if self.output is not None and self.output.is_dir():
            raise InputError(f"output ({self.output}) is a folder; name a file in it")
        if self.output is not None and not self.output.parent.is_dir():
            raise InputError(
                f"output ({self.output}) lies in no folder that exists; create {self.output.parent}"
            )


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Score `args.model` on `args.data`, print the figures, and write them to `args.output`.

    Raises:
        InputError: model, data or split cannot be found or read.
    """
    model, tokenizer = load_model_folder(
        args.model,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
    )
    logger.info("model %s on %s, data %s (%s)", args.model, model.device, args.data, args.split)
    revision = resolve_revision(args.data, args.revision)
    validation, fraction = _cut_of_run(args)
    dataset = load_stories(
        args.data,
        args.split,
        text_column=args.text_column,
        revision=revision if is_on_hub(args.data) else None,
        validation=validation if args.split == "validation" else None,
        validation_fraction=fraction,
    )
    texts = dataset[: args.max_stories]["text"] if args.max_stories else dataset["text"][:]
    report = score_texts(
        model,
        tokenizer,
        texts,
        batch_size=args.batch_size,
        told_by_grammar=args.data == "builtin",
        progress=True,
    )
    report |= {
        "model": args.model,
        "model_revision": args.model_revision,
        "data": args.data,
        "revision": revision,
        "split": args.split,
        "protocol": PROTOCOL,
    }
    print(summary(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        logger.info("written to %s", args.output)
    return report


def _cut_of_run(args: EvaluateArgs) -> tuple[Literal["auto", "cut"], float]:
    """How validation stories are told from training stories: as the run did that made the model.

    Another share than the run's would score stories that it was trained on.
    """
    run_config = Path(args.model).parent / "config.yaml"
    data = load_config(run_config).data if run_config.is_file() else DataArgs()
    return args.validation or data.validation, args.validation_fraction or data.validation_fraction


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int,
    told_by_grammar: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """The figures of `model` on `texts`; see `likelihood` for the protocol.

    With `told_by_grammar` (stories of the built-in corpus) `entropy` and `entropy_bits_per_byte` say
    what the grammar itself assigns to these very stories: on average no model can score below it.
    """
    scores = score_stories(
        model,
        encode_stories(tokenizer, texts),
        eos_token_id=tokenizer.eos_token_id,
        batch_size=batch_size,
        progress=progress,
    )
    metric = StoryLikelihood(keep_in_memory=True)
    num_bytes = [len(text.encode("utf-8")) for text in texts]
    metric.add_batch(
        nats=scores.nats, num_correct=scores.num_correct, num_tokens=scores.num_tokens, num_bytes=num_bytes
    )
    report = metric.compute()
    if told_by_grammar:
        nats = -math.fsum(builtin.log_prob(text) for text in texts)
        report["entropy"] = nats / report["num_tokens"]
        report["entropy_bits_per_byte"] = nats / math.log(2) / report["num_bytes"]
    return report


def summary(report: dict[str, Any]) -> str:
    """The figures as lines for people."""
    known = "entropy" in report
    lines = [
        f"loss           {report['loss']:.4f} nats per token"
        + (f"   (the corpus's own entropy: {report['entropy']:.4f})" if known else ""),
        f"bits per byte  {report['bits_per_byte']:.4f}"
        + (
            f"                  (the corpus's own entropy: {report['entropy_bits_per_byte']:.4f})"
            if known
            else ""
        ),
        f"perplexity     {report['perplexity']:.3f}",
        f"accuracy       {report['accuracy']:.1%} of next tokens",
        f"scored         {report['num_stories']:,} stories, {report['num_tokens']:,} tokens, "
        f"{report['num_bytes']:,} bytes",
    ]
    return "\n".join(lines)
