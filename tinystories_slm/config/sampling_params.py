"""Sampling parameters of a generation request, and as options of a command."""

import math
from dataclasses import dataclass, fields

from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names that transformers' `generate()` uses.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 256
    """Maximum number of new tokens; a completion also ends where the model's context is full."""
    temperature: float = 0.8
    """Divisor of the logits: below 1 less random, above 1 more random; 0 selects the most probable token."""
    top_k: int = 50
    """Sample from the top_k most probable tokens; 0 for all."""
    top_p: float = 0.95
    """Sample from the most probable tokens with this total probability; 1 for all."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the largest probability; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1, reduce the scores of tokens that the completion already contains; 1 for no penalty."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1; try 256")
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf):
            raise UserError(f"temperature ({self.temperature}) must be 0 (greedy) or at least 0.001; try 0.8")
        if self.top_k < 0:
            raise UserError(f"top_k ({self.top_k}) must be 0 (off) or above; try 50")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p ({self.top_p}) must be in (0, 1]; try 0.95, or 1 to switch it off")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p ({self.min_p}) must be in [0, 1]; try 0.05, or 0 to switch it off")
        if not 0.1 <= self.repetition_penalty <= 10.0:
            raise UserError(
                f"repetition_penalty ({self.repetition_penalty}) must be in [0.1, 10]; "
                "try 1.1, or 1 to switch it off"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(SamplingParams):
    """Base class of the options of commands that generate text."""

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters alone."""
        return SamplingParams(**{field.name: getattr(self, field.name) for field in fields(SamplingParams)})
