"""The optimizers and the learning-rate schedule."""

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from tinystories_slm.config import TrainArgs
from tinystories_slm.model import TinyStoriesForCausalLM


def build_optimizers(model: TinyStoriesForCausalLM, args: TrainArgs) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on everything, or on what Muon leaves it.

    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) orthogonalizes the momentum of the
    blocks' matrices; its update is scaled to AdamW's size (Liu et al., arXiv 2502.16982), so that one
    learning rate serves both. Decay is on matrices only: pulling norms and biases to zero helps nothing.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2] if args.optimizer == "muon" else []
    hidden_ids = set(map(id, hidden))
    rest = [p for p in parameters if id(p) not in hidden_ids]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)]
    if hidden:
        muon = torch.optim.Muon(
            hidden, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def build_scheduler(optimizer: torch.optim.Optimizer, args: TrainArgs) -> LRScheduler:
    """Linear warm-up to `lr`, then half a cosine down to `lr * min_lr_rate` at the last step.

    Step s of the warm-up (1, 2, ...) runs at lr x s / warmup_steps: no step is spent at zero.
    """
    return get_scheduler(
        "cosine_warmup_with_min_lr",
        optimizer,
        num_warmup_steps=args.warmup_steps,
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs={"min_lr_rate": args.min_lr_rate},
    )
