"""Examination of a model: does it load here, and does generation compute what the model computes?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.doctor import machine
from tinystories_slm.doctor.finding import Finding, examine
from tinystories_slm.export.checks import PROMPT
from tinystories_slm.generation.cache_check import cache_error, max_cache_error
from tinystories_slm.generation.telling import context_length, prompt_token_ids
from tinystories_slm.model_folder import load_model_folder


@dataclass(frozen=True, kw_only=True)
class ModelDoctorArgs:
    """A model to examine with the installed packages; nothing is written.

    The exit code is 0 without problems, 1 with problems, 2 for a model that cannot be loaded.
    """

    model: str
    """Model folder (RUN/best, an export) or Hub id of any causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    trust_remote_code: bool = False
    """Run code that the model brings; not needed for models trained here."""
    output: Path | None = None
    """File for the findings as JSON; null for none."""


def check_model(args: ModelDoctorArgs) -> Iterator[Finding]:
    """Yield every finding about `args.model`.

    Raises:
        InputError: the model cannot be loaded.
    """
    yield from examine("packages", machine.packages)
    model, tokenizer = load_model_folder(
        args.model, revision=args.revision, trust_remote_code=args.trust_remote_code, device="cpu"
    )
    prompt_ids = prompt_token_ids(model, tokenizer, PROMPT)
    yield from examine("weights", partial(_weights, model, tokenizer))
    yield from examine("forward pass", partial(_forward_pass, model, prompt_ids))
    yield from examine("generation", partial(_generation, model, prompt_ids))


def _weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    not_finite = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    rows = model.get_input_embeddings().weight.shape[0]
    described = (
        f"{type(model).__name__}, {model.num_parameters():,} parameters, context of {context_length(model)}"
    )
    if not_finite:
        yield Finding(
            "weights",
            "PROBLEM",
            f"{len(not_finite)} of the weights hold NaN or infinity, first {not_finite[0]}",
            "take an earlier checkpoint",
        )
    elif len(tokenizer) > rows:
        yield Finding(
            "weights",
            "PROBLEM",
            f"the tokenizer has {len(tokenizer):,} entries, the embedding {rows:,} rows",
            "use the tokenizer that the model was trained with",
        )
    else:
        yield Finding("weights", "ok", described)


@torch.no_grad()
def _forward_pass(model: PreTrainedModel, prompt_ids: list[int]) -> Iterator[Finding]:
    ids = torch.tensor([prompt_ids])
    loss = model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.item()
    verdict = "ok" if math.isfinite(loss) else "PROBLEM"
    remedy = None if verdict == "ok" else "take an earlier checkpoint"
    yield Finding("forward pass", verdict, f"loss {loss:.3f} nats per token on {PROMPT!r}", remedy)


def _generation(model: PreTrainedModel, prompt_ids: list[int]) -> Iterator[Finding]:
    error, bound = cache_error(model, prompt_ids), max_cache_error(model.dtype)
    text = f"with and without the cache, logits differ by {error:.2g} of the largest (at most {bound:g})"
    if error <= bound:
        yield Finding("generation", "ok", text)
    else:
        yield Finding(
            "generation",
            "PROBLEM",
            f"{text}: generate() does not compute what the model computes",
            "renew its code (push_to_hub.py --code_only), or install a transformers that its card names",
        )
