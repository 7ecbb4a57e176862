"""Weights to begin with: `model.init_from`, somebody's finished model, as against a run that goes on."""

import torch
from transformers import PreTrainedTokenizerBase

from tinystories_slm.errors import InputError
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder

# What a model may differ in and still take another's weights.
_FREE = {
    "dropout",
    "initializer_range",
    "zero_init_residual",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
}


def load_initial_weights(
    source: str, config: TinyStoriesConfig, tokenizer: PreTrainedTokenizerBase
) -> TinyStoriesForCausalLM:
    """A model of `config`, in float32 on the CPU, with the weights of the folder or Hub id `source`.

    Raises:
        InputError: nothing loadable there, another architecture (with every difference), or another
            vocabulary, in which the same ids would be other words.
    """
    theirs, their_tokenizer = load_model_folder(source, device=torch.device("cpu"))
    if not isinstance(theirs, TinyStoriesForCausalLM):
        raise InputError(
            f"model.init_from ({source}) is a {type(theirs).__name__}; it must be a model that was trained "
            "by this program"
        )
    free = _FREE | ({"max_position_embeddings"} if config.family == "modern" else set())
    differences = [
        f"{name} is {getattr(theirs.config, name)!r} there and {getattr(config, name)!r} here"
        for name in TinyStoriesConfig.__annotations__
        if name not in free and getattr(theirs.config, name) != getattr(config, name)
    ]
    if differences:
        raise InputError(
            f"model.init_from ({source}) is another architecture: {', '.join(differences)}; set the model.* "
            "options (data.seq_len for max_position_embeddings) to what it has"
        )
    if their_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"model.init_from ({source}) has another vocabulary than the data; prepare them with "
            f"--tokenizer.pretrained {source} in another --data.data_dir"
        )
    model = TinyStoriesForCausalLM(config)
    model.load_state_dict(theirs.state_dict())
    return model
