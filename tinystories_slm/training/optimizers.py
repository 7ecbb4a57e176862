"""AdamW and Muon: parameter groups and learning rates."""

import torch

from tinystories_slm.config import TrainArgs
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.muon import Muon


def build_optimizers(
    model: TinyStoriesForCausalLM, args: TrainArgs, *, precision: str = "bf16"
) -> list[torch.optim.Optimizer]:
    """Build AdamW (Loshchilov & Hutter, arXiv 1711.05101) for all weights, or Muon and AdamW.

    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) takes the matrices of the blocks and
    orthogonalizes their momentum; AdamW takes the rest. Muon's update is scaled to AdamW's RMS (Liu et
    al., arXiv 2502.16982), so that one learning rate serves both. Weight decay applies to matrices only;
    decay of norms and biases does not help. The learning rate is 0 until `set_learning_rate`, which the
    loop calls before each step.

    Returns:
        AdamW, followed by Muon if `train.optimizer` is muon. Muon orthogonalizes in float32 if
        `precision` is "no", else in bfloat16.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2] if args.optimizer == "muon" else []
    hidden_ids = set(map(id, hidden))
    rest = [p for p in parameters if id(p) not in hidden_ids]
    embedding = model.model.embed_tokens.weight
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
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
    optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(args.beta1, args.beta2), fused=True)]
    if hidden:
        muon = Muon(
            hidden,
            lr=0.0,
            weight_decay=args.weight_decay,
            ns_steps=args.muon_ns_steps,
            momentum=args.muon_momentum,
            dtype=torch.float32 if precision == "no" else torch.bfloat16,
        )
        optimizers.append(muon)
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group to `lr`, times the group's `lr_rate` if it has one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_rate", 1.0)
