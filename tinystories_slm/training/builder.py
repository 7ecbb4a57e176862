"""Set up a model for training; the loop, the doctor and the benchmarks share this code."""

import torch

from tinystories_slm.config import TrainArgs
from tinystories_slm.kernels.compiled_loss import compiled_linear_cross_entropy
from tinystories_slm.kernels.training import fuse
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.ema import EMA
from tinystories_slm.training.optimizers import build_optimizers
from tinystories_slm.training.runtime import RuntimeSettings


def prepare_to_train(
    model: TinyStoriesForCausalLM, args: TrainArgs, runtime: RuntimeSettings
) -> tuple[EMA | None, list[torch.optim.Optimizer]]:
    """Set up `model` in place for `runtime`, and build its EMA and optimizers.

    Attention backend, fused kernels and compilation change neither the parameters nor their names.

    Returns:
        The EMA of the weights, or None if `train.ema_decay` is null; and the optimizers at learning rate 0.
    """
    model.set_attn_implementation(runtime.attention)
    ema = EMA(model, args.ema_decay) if args.ema_decay is not None else None
    if runtime.fused:
        fuse(model)
    if runtime.compiled:
        for layer in model.model.layers:
            layer.compile()  # in place, so that parameter names and saved files stay the same
        model.linear_loss = compiled_linear_cross_entropy
    return ema, build_optimizers(model, args, precision=runtime.precision)
