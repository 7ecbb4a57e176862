"""Gather an FSDP2-sharded model for evaluation, generation and saving."""

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from tinystories_slm.model import TinyStoriesForCausalLM


def unsharded_copy(model: TinyStoriesForCausalLM) -> TinyStoriesForCausalLM:
    """Return `model` itself, or a complete copy of it on every process if it is sharded.

    A forward pass of a sharded model is a collective operation of all processes, and its parameters are
    shards. The copy can be used by one process alone. If the model is sharded, every process must call
    this function. The copy takes 4 bytes per parameter on each process.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = TinyStoriesForCausalLM(model.config)
    copy.load_state_dict(weights)
    copy.tie_weights()
    return copy.to(next(iter(weights.values())).device).train(model.training)
