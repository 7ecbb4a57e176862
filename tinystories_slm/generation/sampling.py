"""How the next token is chosen, with a die of its own for each story."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from tinystories_slm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The knobs of sampling, in `generate()`'s own words.

    Raises:
        InputError: a value that `generate()` could not mean.
    """

    max_new_tokens: int = 256
    """Tokens added to the prompt at most; a story also ends where the model's context does."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int = 50
    """Draw from the so many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 for all."""
    min_p: float = 0.0
    """Draw from the tokens at least so likely as this share of the likeliest; 0 for all."""
    repetition_penalty: float = 1.0
    """Makes tokens less likely that the story, after its prompt, has used already; 1 for not."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1")
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf):
            raise InputError(
                f"temperature ({self.temperature}) must be 0 (greedy) or at least 0.001; try 0.8"
            )
        if self.top_k < 0:
            raise InputError(f"top_k ({self.top_k}) must be 0 (off) or above; try 50")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p ({self.top_p}) must lie in (0, 1]; try 0.95, or 1 to switch it off")
        if not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"min_p ({self.min_p}) must lie in [0, 1]; try 0.05, or 0 to switch it off")
        if not 0.1 <= self.repetition_penalty <= 10.0:
            raise InputError(
                f"repetition_penalty ({self.repetition_penalty}) must lie in [0.1, 10]; "
                "try 1.1, or 1 to switch it off"
            )

    def processors(self, seeds: Sequence[int], prompt_length: int) -> LogitsProcessorList:
        """What turns logits (B, V) into scores whose largest is the next token of each of B stories.

        `prompt_length` positions, padding included, are no part of what the repetition penalty counts:
        else padding, which is the end token, would keep the shorter prompts of a batch from ending.
        """
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            steps.append(
                RepetitionPenaltyLogitsProcessor(self.repetition_penalty, prompt_ignore_length=prompt_length)
            )
        if self.temperature > 0:
            steps.append(StoryDice(self, seeds))
        return steps

    def choose(self, scores: Tensor, dice: Sequence[random.Random]) -> Tensor:
        """The next token (B,) of each of B stories, drawn by its own die from its scores (B, V).

        Temperature, top_k, top_p and min_p cut in `generate()`'s order, but only the top_k likeliest tokens
        are ever looked at. Then one uniform number each is looked up in the cumulative probabilities, in
        the vocabulary's order: there no tie of two tokens, broken this way or that, moves a third one.
        """
        if self.temperature == 0:
            return _first_choice(scores)
        scores = scores.to(torch.float32) / self.temperature
        ids = None
        if 0 < self.top_k < scores.shape[-1]:
            scores, ids = scores.topk(self.top_k)  # (B, k), likeliest first
        probabilities = scores.softmax(dim=-1)
        if self.top_p < 1.0:
            if ids is None:
                probabilities, ids = _likeliest(probabilities, self.top_p)
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        if self.min_p > 0.0:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        if ids is not None:
            ids, order = ids.sort(dim=-1)
            probabilities = probabilities.gather(-1, order)
        cumulative = probabilities.to("cpu", torch.float64).cumsum(dim=-1)
        total = cumulative[:, -1:]
        drawn = torch.tensor([[die.random()] for die in dice], dtype=torch.float64) * total  # (B, 1)
        # Below the total even where the product rounds up to it: behind the last step there is no token.
        drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
        at = torch.searchsorted(cumulative, drawn, right=True)
        at = at.clamp(max=cumulative.shape[-1] - 1).to(
            scores.device
        )  # a diverged model's NaN are in no order
        return (at if ids is None else ids.gather(-1, at)).squeeze(-1)


def _first_choice(scores: Tensor) -> Tensor:
    """The likeliest token (B,) by scores (B, V)."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        # torch's argmax over a vocabulary takes six times as long, a twentieth of the step of 256 stories.
        return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities and ids, likeliest first, of at least the tokens that together have `top_p`."""
    num_tokens = min(512, probabilities.shape[-1])  # nearly always enough, and far cheaper than to sort all
    most, ids = probabilities.topk(num_tokens)
    if num_tokens < probabilities.shape[-1] and bool((most.sum(dim=-1) < top_p).any()):
        return probabilities.sort(dim=-1, descending=True)
    return most, ids


def story_die(seed: int) -> random.Random:
    """A story's own random numbers, one for each token.

    They make a story a function of (model, prompt, settings, seed): the same alone, in any batch, streamed
    or not, on any device up to rounding; and the caller's random state stays untouched. Python promises the
    same numbers from each version of it.
    """
    return random.Random(seed)


class StoryDice(LogitsProcessor):
    """`Sampling.choose` for any model's `generate()`: the chosen token alone keeps a score."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.sampling, self.dice = sampling, [story_die(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.sampling.choose(scores, self.dice)
        return torch.full_like(scores, -math.inf).scatter_(-1, chosen[:, None], 0.0)
