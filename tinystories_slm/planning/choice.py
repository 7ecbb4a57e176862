"""Choice of a run for a time: a function of the law, the measured speeds and the options that are fixed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinystories_slm.errors import UserError
from tinystories_slm.planning.law import LossLaw

SEQ_LEN = 256
SHAPES = (
    (2, 64), (2, 128), (3, 128), (3, 192), (4, 256), (6, 256), (6, 384), (8, 384), (8, 512)
)  # fmt: skip
"""(num_hidden_layers, hidden_size) from small to large."""
HEAD_SIZE = 64
MIN_STEPS = 50
"""Fewer optimizer steps do not give a model that the law describes."""

# (training tokens, sequences of an optimizer step up to there), as the presets of one and ten minutes have.
_BATCHES = ((2e6, 8), (2e7, 16), (2e8, 32), (math.inf, 64))
# train.lr at widths of 128 and 256 (docs/recipe.md); 64 wants twice as much.
_LR, _LR_WIDTHS = 7e-3, (128, 256)
_WARMUP_STEPS = 20
# max_minutes ends the run; a faster machine than measured has steps left.
_STEP_MARGIN = 20
# A forward pass takes a third of the time of a training step; evaluation in float32 half as long again.
_FORWARD_SHARE = 0.5
# The scores after training are in float32: 5.8 s for 208,559 tokens at 54,178 trained tokens per second in
# bf16, on two cores with AMX.
_FLOAT32_SHARE = 1.5
EVAL_STORIES = 100
Shape = tuple[int, int]


@dataclass(frozen=True)
class Budget:
    """Time from the start of training to the end of the command, and what it costs beside the steps."""

    seconds: float
    fixed_s: float = 0.0
    """Seconds of training without steps: start and saves."""
    per_token_s: float = 0.0
    """Seconds of preparation for each token that is read for the first time."""
    evaluated_tokens: float = 0.0
    """Tokens that are scored during training."""
    evaluated_after: float = 0.0
    """Tokens that are scored after training."""
    is_bf16: bool = False
    """Whether training multiplies in bfloat16."""

    def after_s(self, tokens_per_second: float) -> float:
        """Return the seconds between the end of training and that of the command."""
        share = _FLOAT32_SHARE if self.is_bf16 else _FORWARD_SHARE
        return self.evaluated_after * share / tokens_per_second

    def num_tokens(self, tokens_per_second: float, unique_tokens: float) -> float:
        """Return the training tokens that the time allows."""
        scored_s = self.evaluated_tokens * _FORWARD_SHARE / tokens_per_second
        after_s = self.after_s(tokens_per_second)
        free_s = max(0.0, self.seconds - self.fixed_s - scored_s - after_s)
        fresh = free_s / (1 / tokens_per_second + self.per_token_s)
        if fresh <= unique_tokens:
            return fresh
        return max(0.0, (free_s - unique_tokens * self.per_token_s) * tokens_per_second)


@dataclass(frozen=True)
class Candidate:
    """A shape with its measured speed, and the loss that the law expects of it."""

    shape: Shape
    num_parameters: int
    """Without embeddings."""
    tokens_per_second: float
    memory_bytes: float
    num_tokens: float
    bits_per_byte: float


@dataclass(frozen=True)
class Plan:
    """A chosen run."""

    chosen: Candidate
    others: Sequence[Candidate]
    """All measured candidates, the best first."""
    options: Mapping[str, Any]
    """Every option that was chosen, by name; those that were fixed are not among them."""
    num_steps: int
    relative_error: float
    """Of the expected loss."""
    extrapolation: str | None


@dataclass(frozen=True)
class Measurement:
    """Size, speed and memory of a shape on this machine."""

    num_parameters: int
    tokens_per_second: float
    memory_bytes: float = 0.0


def shapes(fixed: Mapping[str, Any]) -> list[Shape]:
    """Return the candidates that agree with the options in `fixed`, from small to large."""
    layers, width = (fixed.get(f"model.{name}") for name in ("num_hidden_layers", "hidden_size"))
    found = [(layers or own_layers, width or own_width) for own_layers, own_width in SHAPES]
    return sorted(set(found), key=lambda shape: shape[0] * shape[1] ** 2)


def model_options(shape: Shape) -> dict[str, Any]:
    """Return the options of a model of `shape`."""
    layers, width = shape
    num_heads = max(1, width // HEAD_SIZE)
    while width % (2 * num_heads):  # rotary positions need an even head size
        num_heads -= 1
    return {
        "model.family": "llama",
        "model.qk_norm": True,
        "model.num_hidden_layers": layers,
        "model.hidden_size": width,
        "model.num_attention_heads": num_heads,
    }


def trial_options(shape: Shape) -> dict[str, Any]:
    """Return the options that decide the speed of a model of `shape`."""
    options = training_options(shape, 1000) | {"train.batch_size": _BATCHES[0][1]}
    return model_options(shape) | options


def choose_plan(
    law: LossLaw,
    measured: Mapping[Shape, Measurement],
    budget: Budget,
    *,
    unique_tokens: float = math.inf,
    memory_limit: float = math.inf,
    fixed: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose the shape of the lowest expected loss, and the other options for its number of steps.

    Args:
        law: Expected loss.
        measured: Size, speed and memory of each candidate on this machine.
        budget: Time of the run.
        unique_tokens: Tokens of the corpus; more are repetitions.
        memory_limit: Bytes that the run may take.
        fixed: Options that are not changed, by name.

    Raises:
        UserError: no candidate fits the memory, or the time allows fewer than `MIN_STEPS` steps.
    """
    fixed = fixed or {}
    candidates = []
    for shape, one in measured.items():
        num_tokens = min(budget.num_tokens(one.tokens_per_second, unique_tokens), _max_tokens(fixed))
        loss = law.bits_per_byte(one.num_parameters, max(1.0, num_tokens), unique_tokens)
        speed = one.tokens_per_second
        candidates.append(Candidate(shape, one.num_parameters, speed, one.memory_bytes, num_tokens, loss))
    fitting = [one for one in candidates if one.memory_bytes <= memory_limit]
    if not fitting:
        raise UserError(
            f"minutes ({budget.seconds / 60:.3g}): the smallest model needs "
            f"{min(one.memory_bytes for one in candidates) / 1e6:,.0f} MB of memory, and "
            f"{memory_limit / 1e6:,.0f} MB are free; stop other programs"
        )
    ranked = sorted(fitting, key=lambda one: (one.bits_per_byte, one.num_parameters))
    possible = [one for one in ranked if _num_steps(one.num_tokens, fixed) >= MIN_STEPS]
    if not possible:
        fastest = max(one.tokens_per_second for one in fitting)
        needed_s = budget.fixed_s + 2 * MIN_STEPS * _tokens_per_step(0, fixed) / fastest
        raise UserError(
            f"minutes ({budget.seconds / 60:.3g}): must allow at least {MIN_STEPS} optimizer steps, which "
            f"take about {math.ceil(10 * needed_s / 60) / 10:g} on this machine; set a larger number"
        )
    chosen = possible[0]
    tokens_per_step, num_steps = (of(chosen.num_tokens, fixed) for of in (_tokens_per_step, _num_steps))
    options = model_options(chosen.shape) | training_options(chosen.shape, num_steps)
    options["train.batch_size"] = tokens_per_step // fixed.get("data.seq_len", SEQ_LEN)
    options["train.max_minutes"] = round((budget.seconds - budget.after_s(chosen.tokens_per_second)) / 60, 4)
    options["train.eval_every"] = options["train.save_every"] = max(
        1, num_steps // num_evaluations(budget.seconds)
    )
    options = {name: value for name, value in options.items() if name not in fixed}
    extrapolation = law.extrapolation(chosen.num_parameters, chosen.num_tokens)
    return Plan(chosen, ranked, options, num_steps, law.relative_error, extrapolation)


def num_evaluations(seconds: float) -> int:
    """Return the number of evaluations of a run: one a minute, at most ten."""
    return max(1, min(10, int(seconds / 60)))


def is_larger_promising(plan: Plan, last: Shape) -> bool:
    """Whether shapes larger than `last`, the largest of `plan`, may have a lower expected loss."""
    found = [one for one in plan.others if one.shape == last]
    return bool(found) and found[0].bits_per_byte < plan.chosen.bits_per_byte * (1 + plan.relative_error)


def _tokens_per_step(num_tokens: float, fixed: Mapping[str, Any]) -> int:
    batch_size = next(size for limit, size in _BATCHES if num_tokens <= limit)
    return fixed.get("train.batch_size", batch_size) * fixed.get("data.seq_len", SEQ_LEN)


def _num_steps(num_tokens: float, fixed: Mapping[str, Any]) -> int:
    return int(num_tokens / _tokens_per_step(num_tokens, fixed))


def _max_tokens(fixed: Mapping[str, Any]) -> float:
    """Return the training tokens of a fixed number of steps."""
    if "train.max_steps" not in fixed:
        return math.inf
    sequences = fixed["train.max_steps"] * fixed.get("train.batch_size", _BATCHES[0][1])
    return float(sequences * fixed.get("data.seq_len", SEQ_LEN))


def training_options(shape: Shape, num_steps: int) -> dict[str, Any]:
    """Return the recipe of docs/recipe.md for so many steps."""
    width = shape[1]
    narrow, wide = _LR_WIDTHS
    lr = _LR * min(2.0, max(1.0, narrow / width)) * math.sqrt(min(1.0, wide / width))
    return {
        "data.seq_len": SEQ_LEN,
        "data.packing": "contiguous",
        "data.mask_across_stories": True,
        "train.max_steps": _STEP_MARGIN * num_steps,
        "train.optimizer": "muon",
        # Averages over a longer time in a longer run: 0.75 at 400 steps, 0.9 from 1,500 on.
        "train.muon_momentum": round(min(0.9, max(0.75, 1 - 150 / num_steps)), 3),
        "train.lr": float(f"{lr:.3g}"),
        "train.embedding_lr_multiplier": 3.0,
        "train.beta2": 0.99,
        # A constant part, so that `--more` continues it.
        "train.schedule": "wsd",
        "train.decay_fraction": 0.7,
        "train.min_lr_rate": 0.0,
        "train.warmup_steps": min(_WARMUP_STEPS, num_steps // 10),
        "train.eval_stories": EVAL_STORIES,
    }
