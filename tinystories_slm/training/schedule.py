"""The learning rate: a function of the step, and of the time where a run has a time limit."""

import math

from tinystories_slm.config import TrainArgs

REFERENCE_WIDTH = 256
REFERENCE_TOKENS = 4096
"""Width of the model and tokens per optimizer step that `train.lr` is meant for under `train.lr_scaling`."""

# Theory's values; from 64 to 256 wide the best rate fell faster in short runs (docs/recipe.md). Width: what
# an update does to an activation stays the same if AdamW's rate falls as 1 / width (Yang et al., muP, arXiv
# 2203.03466); Muon's update, given AdamW's size as a root mean square (Liu et al., arXiv 2502.16982), has a
# spectral norm that grows as sqrt(width) where AdamW's grows as width. Batch: square root (Malladi et al.,
# arXiv 2205.10782).
WIDTH_EXPONENT = {"adamw": -1.0, "muon": -0.5}
TOKENS_EXPONENT = 0.5


def peak_lr(args: TrainArgs, *, hidden_size: int, tokens_per_step: int) -> float:
    """The learning rate at the end of the warm-up: `args.lr`, with `args.lr_scaling` scaled to this run.

    Then one value serves models of all widths and batches of all sizes, in tokens per optimizer step. It
    is one rate for all weights: muP proper would leave that of embeddings and vectors as it is.
    """
    if not args.lr_scaling:
        return args.lr
    width = (hidden_size / REFERENCE_WIDTH) ** WIDTH_EXPONENT[args.optimizer]
    return args.lr * width * (tokens_per_step / REFERENCE_TOKENS) ** TOKENS_EXPONENT


def lr_factor(args: TrainArgs, step: int, time_fraction: float = 0.0) -> float:
    """The learning rate of the optimizer step after `step` finished ones, as a share of the peak.

    Linear warm-up (the first step runs at 1 / warmup_steps: none is spent at zero), then one of

    - `cosine`: half a cosine (Loshchilov & Hutter, arXiv 1608.03983);
    - `wsd`: the peak, and over the last `decay_fraction` a straight line (Hu et al., MiniCPM, arXiv
      2404.06395; Hägele et al., arXiv 2405.18392). Of the shapes they try 1 - sqrt is a little better;
      the line is taken because it does not begin with a fall, which a clock that is read once a step
      would turn into a jump, and because at `decay_fraction` 1 it is the plain linear decay that
      Bergsma et al. (arXiv 2502.15938) find best where a run's length is known.

    Both reach `min_lr_rate` at the last step. Being a function, it has no state that a checkpoint could
    lose. `time_fraction`, in [0, 1], is the share of the time after the warm-up that is used up: the
    later of the two clocks, steps or time, is followed.
    """
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    step_fraction = (step - args.warmup_steps + 1) / (args.max_steps - args.warmup_steps)
    fraction = min(1.0, max(step_fraction, time_fraction))
    if args.schedule == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * fraction))
    else:
        height = min(1.0, (1.0 - fraction) / args.decay_fraction)
    return args.min_lr_rate + (1.0 - args.min_lr_rate) * height


def time_fraction(args: TrainArgs, *, seconds: float, warmup_seconds: float, closing_seconds: float) -> float:
    """Share of the time after the warm-up that is used up: 0 without a time limit, 1 when the run has to end.

    All in wall-clock seconds of the run: `seconds` so far, `warmup_seconds` at the end of the warm-up,
    and `closing_seconds` that the last evaluation and the last save will take.
    """
    if args.max_minutes is None:
        return 0.0
    end = 60 * args.max_minutes - closing_seconds
    if seconds >= end:
        return 1.0
    return (seconds - warmup_seconds) / (end - warmup_seconds)
