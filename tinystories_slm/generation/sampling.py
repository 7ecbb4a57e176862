"""How the next token is chosen: transformers' logits processors, and a die of its own for each story."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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
        if self.temperature == 0:
            return steps
        steps.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            steps.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p > 0.0:
            steps.append(MinPLogitsWarper(float(self.min_p)))
        steps.append(StoryDice(seeds))
        return steps


class StoryDice(LogitsProcessor):
    """Makes the largest score a fair draw from softmax(scores), with random numbers of each story's own.

    Subtracting log E, E ~ Exp(1) for each token, and taking the largest is the exponential race by which
    `torch.multinomial` itself draws. Seeding each row apart makes a story a function of (model, prompt,
    settings, seed): the same alone, in any batch, streamed or not, on any device up to rounding; and the
    caller's random state stays untouched.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # On the CPU in float64 whatever the device: the same numbers everywhere, and an E of 0 out of reach.
        race = torch.empty(scores.shape, dtype=torch.float64)  # (B, V)
        for row, generator in zip(race, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - race.clamp_min_(1e-300).log_().to(scores.dtype).to(scores.device)
