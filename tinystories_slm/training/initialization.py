"""Initial weights from another model (`model.init_from`), in contrast to resuming a run."""

import torch
from transformers import PreTrainedTokenizerBase

from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.training_data import read_training_data
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, resolve_model

# Configuration fields in which the two models may differ.
_IGNORED_FIELDS = {
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
    """Return a model of `config`, in float32 on the CPU, with the weights of the folder or Hub id `source`.

    The training data of `source` are added to the record in `config`.

    Raises:
        UserError: `source` cannot be loaded, has another architecture (lists every difference), or has
            another vocabulary, in which the same ids are other tokens.
    """
    source_model, source_tokenizer = load_model_folder(source, device=torch.device("cpu"))
    if not isinstance(source_model, TinyStoriesForCausalLM):
        raise UserError(
            f"model.init_from ({source}) is a {type(source_model).__name__}; it must be a model "
            "trained by this program"
        )
    ignored = _IGNORED_FIELDS | ({"max_position_embeddings"} if config.has_rope else set())
    differences = [
        f"{name} is {getattr(source_model.config, name)!r} there and {getattr(config, name)!r} in this run"
        for name in TinyStoriesConfig.__annotations__
        if name not in ignored and getattr(source_model.config, name) != getattr(config, name)
    ]
    if differences:
        raise UserError(
            f"model.init_from ({source}) has another architecture: {', '.join(differences)}; set the "
            "model.* options (data.seq_len for max_position_embeddings) to the values of that model"
        )
    if source_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"model.init_from ({source}) has another vocabulary than the data; prepare the data with "
            f"--tokenizer.pretrained {source} in another --data.data_dir"
        )
    base_data = [
        data.to_dict() for data in read_training_data(resolve_model(source).name, source_model.config) or ()
    ]
    config.training_data = [*base_data, *getattr(config, "training_data", ())]
    model = TinyStoriesForCausalLM(config)
    model.load_state_dict(source_model.state_dict())
    return model
