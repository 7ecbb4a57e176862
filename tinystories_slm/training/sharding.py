"""A model that is sharded among processes (FSDP2), made whole to be evaluated, asked for stories or saved."""

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from tinystories_slm.model import TinyStoriesForCausalLM


def whole_model(model: TinyStoriesForCausalLM) -> TinyStoriesForCausalLM:
    """`model` itself, or on every process a plain copy of it where it is sharded.

    A sharded model answers only if all processes ask it the same number of times, and its parameters are
    pieces; the copy may be used by one process alone. Where the model is sharded, every process has to
    call this. The copy takes 4 bytes a parameter on each of them while it lives.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = TinyStoriesForCausalLM(model.config)
    copy.load_state_dict(weights)
    copy.tie_weights()
    return copy.to(next(iter(weights.values())).device).train(model.training)
