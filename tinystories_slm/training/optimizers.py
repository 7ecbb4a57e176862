"""Optimizers by name, each with the facts that the rest of a run needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tinystories_slm.config.sections import OptimizerArgs
from tinystories_slm.errors import UserError
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.model_costs import num_block_matrix_weights, num_parameters
from tinystories_slm.training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer of `train.optimizer`: how to build it, and its facts."""

    build: Callable[[TinyStoriesForCausalLM, OptimizerArgs, str], list[torch.optim.Optimizer]]
    """Function of the model, the options and the precision (`no`, `fp16`, `bf16`); the result covers every
    weight once. The learning rate is 0 until `set_learning_rate`, which the loop calls before each step."""
    width_exponent: float
    """With `train.lr_scaling` the peak learning rate is proportional to this power of the model's width."""
    state_bytes: Callable[[TinyStoriesConfig], int]
    """Bytes of the optimizer's state, in memory and in a checkpoint."""
    supports_fp16: bool = True
    """Whether it works with the gradient scaler of fp16, which supports one optimizer."""
    skips_on_device: bool = False
    """Whether `step()` reads the attribute `found_inf` on the device and then changes nothing, as torch's
    fused optimizers do. If not, the gradient norm is read on the host at every step."""


def optimizer_spec(name: str) -> OptimizerSpec:
    """Return the entry of `OPTIMIZERS`.

    Raises:
        UserError: there is no optimizer of that name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"train.optimizer ({name}): must be one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def build_optimizers(
    model: TinyStoriesForCausalLM, args: OptimizerArgs, *, precision: str = "bf16"
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of `args` for all weights of `model`, at learning rate 0."""
    return optimizer_spec(args.optimizer).build(model, args, precision)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group to `lr`, times the group's `lr_rate` if it has one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_rate", 1.0)


def _build_adamw(
    model: TinyStoriesForCausalLM, args: OptimizerArgs, precision: str
) -> list[torch.optim.Optimizer]:
    return [_adamw(model, args, [p for p in model.parameters() if p.requires_grad])]


def _build_muon(
    model: TinyStoriesForCausalLM, args: OptimizerArgs, precision: str
) -> list[torch.optim.Optimizer]:
    """Build AdamW for embeddings, head and vectors, and Muon for the matrices of the blocks.

    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) orthogonalizes the momentum of a matrix, in
    float32 if `precision` is "no", else in bfloat16. Its update is scaled to AdamW's RMS (Liu et al., arXiv
    2502.16982), so that one learning rate serves both.
    """
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2 and p.requires_grad]
    hidden_ids = set(map(id, hidden))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in hidden_ids]
    muon = Muon(
        hidden,
        lr=0.0,
        weight_decay=args.weight_decay,
        ns_steps=args.muon_ns_steps,
        momentum=args.muon_momentum,
        dtype=torch.float32 if precision == "no" else torch.bfloat16,
    )
    return [_adamw(model, args, rest), muon]


def _adamw(
    model: TinyStoriesForCausalLM, args: OptimizerArgs, parameters: list[torch.nn.Parameter]
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter, arXiv 1711.05101) for `parameters`.

    Weight decay applies to matrices only; decay of norms and biases does not help.
    """
    embedding = model.model.embed_tokens.weight
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # With a multiplier of 1 there are two groups, as in checkpoints older than this option.
    if args.embedding_lr_multiplier != 1.0:
        groups[0]["params"] = [p for p in groups[0]["params"] if p is not embedding]
        embedding_group = {
            "params": [embedding],
            "weight_decay": args.weight_decay,
            "lr_rate": args.embedding_lr_multiplier,
        }
        groups.append(embedding_group)
    return torch.optim.AdamW(groups, lr=0.0, betas=(args.beta1, args.beta2), fused=True)


def _muon_state_bytes(config: TinyStoriesConfig) -> int:
    matrices = num_block_matrix_weights(config)
    return 8 * (num_parameters(config) - matrices) + 4 * matrices


# Width exponents from theory; from width 64 to 256 the best rate fell faster in short runs (docs/recipe.md).
# The effect of an update on an activation is constant if AdamW's rate falls as 1 / width (Yang et al., muP,
# arXiv 2203.03466). Muon's update, scaled to AdamW's RMS, has a spectral norm that grows as sqrt(width);
# AdamW's grows as width.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(
        build=_build_adamw,
        width_exponent=-1.0,
        state_bytes=lambda config: 8 * num_parameters(config),  # two moments
        skips_on_device=True,
    ),
    "muon": OptimizerSpec(
        build=_build_muon,
        width_exponent=-0.5,
        state_bytes=_muon_state_bytes,  # one momentum for each weight of the blocks' matrices
        supports_fp16=False,
    ),
}
"""Optimizers by the name in `train.optimizer`; docs/extending.md adds one."""
