"""Token sampling with one random number generator per request."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from tinystories_slm.config.sampling_params import SamplingParams


def logits_processors(
    params: SamplingParams, seeds: Sequence[int], prompt_length: int
) -> LogitsProcessorList:
    """Return processors of logits (B, V) after which the argmax of each row is the sampled token.

    The repetition penalty ignores the first `prompt_length` positions. They include the padding, which is
    often the stop token: a penalty on it would prevent the shorter prompts of a batch from stopping.
    """
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(
            RepetitionPenaltyLogitsProcessor(params.repetition_penalty, prompt_ignore_length=prompt_length)
        )
    if params.temperature > 0:
        processors.append(PerRequestSampler(params, seeds))
    return processors


def sample(params: SamplingParams, scores: Tensor, rngs: Sequence[random.Random]) -> Tensor:
    """Return one token (B,) per row of scores (B, V), sampled with the generator of that row.

    Temperature, top_k, top_p and min_p apply in the order of `generate()`. With top_k > 0, only the top_k
    most probable tokens are processed. Inverse transform sampling then looks one uniform number per row up in
    the cumulative probabilities in vocabulary order: the order of two tied tokens cannot change a third one.
    """
    if params.temperature == 0:
        return _argmax(scores)
    scores = scores.to(torch.float32) / params.temperature
    ids = None
    if 0 < params.top_k < scores.shape[-1]:
        scores, ids = scores.topk(params.top_k)  # (B, k), most probable first
    probabilities = scores.softmax(dim=-1)
    if params.top_p < 1.0:
        if ids is None:
            probabilities, ids = _top_p_candidates(probabilities, params.top_p)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    if params.min_p > 0.0:
        threshold = params.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
    if ids is not None:
        ids, order = ids.sort(dim=-1)
        probabilities = probabilities.gather(-1, order)
    cumulative = probabilities.cpu().double().cumsum(dim=-1)  # in this order: MPS has no float64
    total = cumulative[:, -1:]
    uniform = torch.tensor([[rng.random()] for rng in rngs], dtype=torch.float64) * total  # (B, 1)
    # Keep the number below the total, to which the product can round up: no token follows the last step.
    uniform = torch.minimum(uniform, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, uniform, right=True)
    # NaN logits of a diverged model are not sorted, and the index can lie past the last token.
    index = index.clamp(max=cumulative.shape[-1] - 1).to(scores.device)
    return (index if ids is None else ids.gather(-1, index)).squeeze(-1)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one token and of the most probable ones, in nats, before temperature and top_k."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """(token, log-probability), most probable first."""


def token_logprobs(scores: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of one token per row of logits (B, V), and of the `num_top` best ones."""
    logprobs = scores.float().log_softmax(dim=-1)
    top, ids = logprobs.topk(num_top)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=scores.device)[:, None]).squeeze(-1)
    return [
        TokenLogprobs(token, value, list(zip(row_ids, row, strict=True)))
        for token, value, row_ids, row in zip(
            tokens, chosen.tolist(), ids.tolist(), top.tolist(), strict=True
        )
    ]


def _argmax(scores: Tensor) -> Tensor:
    """Return the token (B,) with the largest score of each row (B, V)."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        # torch's argmax over a vocabulary takes six times as long, 1/20 of a step of 256 sequences.
        return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def _top_p_candidates(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities and ids, most probable first, of tokens with a total probability of `top_p`.

    The result may contain more tokens than necessary.
    """
    num_tokens = min(512, probabilities.shape[-1])  # nearly always enough, and far cheaper than a full sort
    top, ids = probabilities.topk(num_tokens)
    if num_tokens < probabilities.shape[-1] and bool((top.sum(dim=-1) < top_p).any()):
        return probabilities.sort(dim=-1, descending=True)
    return top, ids


def request_rng(seed: int) -> random.Random:
    """Return the random number generator of one request; each token uses one number.

    The text is then a function of model, prompt, sampling parameters and seed. It is the same in any batch,
    streamed or not, on any device, up to rounding. The caller's random state does not change. Python
    guarantees the same numbers for a seed in all its versions.
    """
    return random.Random(seed)


class PerRequestSampler(LogitsProcessor):
    """`sample` as a logits processor: the sampled token gets score 0, all others -inf."""

    def __init__(self, params: SamplingParams, seeds: Sequence[int]) -> None:
        self.params, self.rngs = params, [request_rng(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampled = sample(self.params, scores, self.rngs)
        return torch.full_like(scores, -math.inf).scatter_(-1, sampled[:, None], 0.0)
