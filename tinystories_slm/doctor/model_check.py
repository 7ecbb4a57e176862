"""Checks of a model: does it load, and does generation match the forward pass?"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.command_args.doctor import ModelDoctorArgs
from tinystories_slm.doctor import machine
from tinystories_slm.doctor.diagnostic import Diagnostic, run_check
from tinystories_slm.generation.cache_check import cache_error, max_cache_error
from tinystories_slm.generation.prompts import DEFAULT_PROMPT
from tinystories_slm.generation.request import context_length, prompt_token_ids
from tinystories_slm.model_folder import load_model_folder


def check_model(args: ModelDoctorArgs) -> Iterator[Diagnostic]:
    """Yield every diagnostic of `args.model`.

    Raises:
        UserError: the model cannot be loaded.
    """
    yield from run_check("packages", machine.check_packages)
    model, tokenizer = load_model_folder(
        args.model, revision=args.revision, trust_remote_code=args.trust_remote_code, device="cpu"
    )
    prompt_ids = prompt_token_ids(model, tokenizer, DEFAULT_PROMPT)
    yield from run_check("weights", partial(_check_weights, model, tokenizer))
    yield from run_check("forward pass", partial(_check_forward_pass, model, prompt_ids))
    yield from run_check("generation", partial(_check_generation, model, prompt_ids))


def _check_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Diagnostic]:
    not_finite = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    rows = model.get_input_embeddings().weight.shape[0]
    text = (
        f"{type(model).__name__}, {model.num_parameters():,} parameters, context of {context_length(model)}"
    )
    if not_finite:
        yield Diagnostic(
            "weights",
            "PROBLEM",
            f"{len(not_finite)} weight tensors contain NaN or infinity, first {not_finite[0]}",
            "use an earlier checkpoint",
        )
    elif len(tokenizer) > rows:
        yield Diagnostic(
            "weights",
            "PROBLEM",
            f"the tokenizer has {len(tokenizer):,} entries, but the embedding has {rows:,} rows",
            "use the tokenizer of the model's training run",
        )
    else:
        yield Diagnostic("weights", "ok", text)


@torch.no_grad()
def _check_forward_pass(model: PreTrainedModel, prompt_ids: list[int]) -> Iterator[Diagnostic]:
    ids = torch.tensor([prompt_ids])
    loss = model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.item()
    verdict = "ok" if math.isfinite(loss) else "PROBLEM"
    remedy = None if verdict == "ok" else "use an earlier checkpoint"
    yield Diagnostic("forward pass", verdict, f"loss {loss:.3f} nats per token on {DEFAULT_PROMPT!r}", remedy)


def _check_generation(model: PreTrainedModel, prompt_ids: list[int]) -> Iterator[Diagnostic]:
    error, bound = cache_error(model, prompt_ids), max_cache_error(model.dtype)
    text = f"with and without the cache, logits differ by {error:.2g} of the largest (at most {bound:g})"
    if error <= bound:
        yield Diagnostic("generation", "ok", text)
    else:
        yield Diagnostic(
            "generation",
            "PROBLEM",
            f"{text}: generate() does not match the model's forward pass",
            "update its code (push_to_hub.py --code_only), or install a transformers version from its card",
        )
