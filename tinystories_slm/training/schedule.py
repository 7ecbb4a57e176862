"""Learning rate as a function of the step, and of the time if the run has a time limit."""

import math

from tinystories_slm.config import ScheduleArgs, TrainArgs
from tinystories_slm.training.optimizers import optimizer_spec

REFERENCE_WIDTH = 256
REFERENCE_TOKENS = 4096
"""Model width and tokens per optimizer step at which `train.lr_scaling` leaves `train.lr` unchanged."""

TOKENS_EXPONENT = 0.5
"""The peak rate is proportional to the square root of the batch (Malladi et al., arXiv 2205.10782)."""


def peak_lr(args: TrainArgs, *, hidden_size: int, tokens_per_step: int) -> float:
    """Return the learning rate at the end of the warm-up: `args.lr`, scaled if `args.lr_scaling` is set.

    With scaling, one value of `args.lr` serves all model widths and all batch sizes in tokens per
    optimizer step. The scaled rate applies to all weights; muP itself does not scale the rate of
    embeddings and vectors.
    """
    if not args.lr_scaling:
        return args.lr
    width = (hidden_size / REFERENCE_WIDTH) ** optimizer_spec(args.optimizer).width_exponent
    return args.lr * width * (tokens_per_step / REFERENCE_TOKENS) ** TOKENS_EXPONENT


def lr_factor(args: ScheduleArgs, step: int, time_fraction: float = 0.0, *, rewarm_step: int = 0) -> float:
    """Return the learning rate of the step after `step` finished ones, as a fraction of the peak.

    Linear warm-up (the first step runs at 1 / warmup_steps, not at zero), then one of

    - `cosine`: half a cosine (Loshchilov & Hutter, arXiv 1608.03983);
    - `wsd`: constant, then linear decay over the last `decay_fraction` (Hu et al., MiniCPM, arXiv
      2404.06395; Hägele et al., arXiv 2405.18392). Of the shapes in those papers 1 - sqrt is slightly
      better. But it starts with a steep fall, which is a jump if the time is read once per step. With
      `decay_fraction` 1, `wsd` is the linear decay that Bergsma et al. (arXiv 2502.15938) find best for
      a known run length.

    Both reach `min_lr_rate` at the last step. The function has no state, so a checkpoint needs none.
    `time_fraction`, in [0, 1], is the used share of the time after the warm-up. The larger of the
    fractions of steps and of time applies.

    A run that was extended after its decay warms up again (Ibrahim et al., arXiv 2403.08763): after
    `rewarm_step` finished steps, in `warmup_steps` steps from `min_lr_rate` to `rewarm_lr_rate`. Then the
    same decay follows.
    """
    low, high = 0.0, 1.0
    if rewarm_step:
        low, high = args.min_lr_rate, max(args.min_lr_rate, args.rewarm_lr_rate)
    warmup_end = rewarm_step + args.warmup_steps
    if step < warmup_end:
        return low + (high - low) * (step - rewarm_step + 1) / args.warmup_steps
    step_fraction = (step - warmup_end + 1) / (args.max_steps - warmup_end)
    height = _decay_height(args, max(step_fraction, time_fraction))
    return args.min_lr_rate + (high - args.min_lr_rate) * height


def _decay_height(args: ScheduleArgs, fraction: float) -> float:
    """Return what is left, in [0, 1], after `fraction` of the steps or of the time after the warm-up."""
    fraction = min(1.0, fraction)
    if args.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * fraction))
    return min(1.0, (1.0 - fraction) / args.decay_fraction)


def has_constant_part(args: ScheduleArgs) -> bool:
    """Whether the schedule stays at the peak for a while before it decays."""
    return args.schedule == "wsd" and args.decay_fraction < 1.0


def is_before_decay(args: ScheduleArgs, step: int, time_fraction: float = 0.0) -> bool:
    """Whether the step after `step` finished ones is in the warm-up or the constant part of the schedule.

    The learning rates up to there are those of every longer run. False without a constant part.
    """
    if not has_constant_part(args):
        return False
    if step < args.warmup_steps:
        return True
    step_fraction = (step - args.warmup_steps + 1) / (args.max_steps - args.warmup_steps)
    return _decay_height(args, max(step_fraction, time_fraction)) == 1.0


def time_fraction(
    args: ScheduleArgs, *, seconds: float, warmup_seconds: float, estimated_final_seconds: float
) -> float:
    """Return the used share of the time after the warm-up: 0 without a time limit, 1 when the run must end.

    Args:
        args: `max_minutes` is the time limit.
        seconds: Wall-clock seconds of the run so far.
        warmup_seconds: Value of `seconds` at the end of the warm-up.
        estimated_final_seconds: Estimated duration of the final evaluation and save.
    """
    if args.max_minutes is None:
        return 0.0
    end = 60 * args.max_minutes - estimated_final_seconds
    if seconds >= end:
        return 1.0
    return (seconds - warmup_seconds) / (end - warmup_seconds)
