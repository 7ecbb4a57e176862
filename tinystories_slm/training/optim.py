"""The optimizers."""

import torch

from tinystories_slm.config import TrainArgs
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.muon import Muon


def build_optimizers(
    model: TinyStoriesForCausalLM, args: TrainArgs, *, precision: str = "bf16"
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on everything, or on what Muon leaves it.

    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) orthogonalizes the momentum of the
    blocks' matrices; its update is scaled to AdamW's size (Liu et al., arXiv 2502.16982), so that one
    learning rate serves both. Decay is on matrices only: pulling norms and biases to zero helps nothing.
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
    if args.embedding_lr_rate != 1.0:  # else two groups, as in checkpoints from before there was this rate
        groups[0]["params"] = [p for p in groups[0]["params"] if p is not embedding]
        own = {"params": [embedding], "weight_decay": args.weight_decay, "lr_rate": args.embedding_lr_rate}
        groups.append(own)
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)]
    if hidden:
        muon = Muon(
            hidden,
            lr=args.lr,
            weight_decay=args.weight_decay,
            ns_steps=args.ns_steps,
            momentum=args.momentum,
            dtype=torch.float32 if precision == "no" else torch.bfloat16,
        )
        optimizers.append(muon)
    return optimizers
