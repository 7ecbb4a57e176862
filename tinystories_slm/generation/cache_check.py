"""Compare generation through the key-value cache with one forward pass over the same text."""

import torch
from transformers import GenerationConfig, PreTrainedModel

_NUM_NEW_TOKENS = 32

_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_16_BIT = 0.05


def max_cache_error(dtype: torch.dtype) -> float:
    """Return the largest `cache_error` that rounding explains.

    Measured: 1e-6 in float32, 0.01 in bfloat16; 0.2 to 1.6 where the cache is ignored.
    """
    return _TOLERANCES.get(dtype, _TOLERANCE_16_BIT)


@torch.no_grad()
def cache_error(model: PreTrainedModel, prompt_ids: list[int]) -> float:
    """Return the relative difference between logits with the cache and logits of one forward pass.

    The model generates the greedy completion of `prompt_ids`, 32 tokens or as many as its context takes,
    with the cache, and then reads the same text in one forward pass without a cache. The result is the
    largest absolute difference of the logits, divided by the largest absolute logit; NaN if a logit is not
    finite.

    transformers 5.24 renamed the argument that carries the cache. A model without that argument generates
    each token from the last one alone, and transformers raises no error; this number detects it.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    num_new_tokens = _NUM_NEW_TOKENS
    if context is not None:
        prompt_ids = prompt_ids[: max(1, context // 2)]
        num_new_tokens = min(num_new_tokens, context - len(prompt_ids))
    ids = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            # A stop token would end the comparison before the cache is read once.
            min_new_tokens=num_new_tokens,
            max_new_tokens=num_new_tokens,
            use_cache=True,
            pad_token_id=prompt_ids[0],
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    cached = torch.stack(output.logits, dim=1).float()  # (1, new tokens, V)
    text = output.sequences
    uncached = model(text, attention_mask=torch.ones_like(text), use_cache=False).logits
    uncached = uncached[:, len(prompt_ids) - 1 : -1].float()
    return ((cached - uncached).abs().max() / uncached.abs().max()).item()
