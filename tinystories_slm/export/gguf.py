"""Export format `gguf`: weights, architecture and vocabulary in one file, for llama.cpp."""

import json
import logging
from pathlib import Path
from typing import Literal

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tinystories_slm.data.tokenizer import save_tokenizer
from tinystories_slm.errors import UserError
from tinystories_slm.export.byte_level import require_byte_level_bpe
from tinystories_slm.export.checks import EquivalenceCheck, compare, require_equal, require_same_ids
from tinystories_slm.export.native import native_model, rope_halves_to_pairs
from tinystories_slm.export.ollama import write_modelfile
from tinystories_slm.gguf_file import TRAINING_DATA, read_gguf_facts
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import default_generation_config

logger = logging.getLogger(__name__)

FILE = "model.gguf"

_TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURES = {
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# llama.cpp computes one activation per architecture and ignores the file's; gelu_new is the same function.
_ACTIVATIONS = {"gpt2": ("gelu_pytorch_tanh", "gelu_new"), "llama": ("silu",), "qwen3": ("silu",)}
# transformers stores GPT-2's matrices as (in, out); ggml expects (out, in), as for any other linear layer.
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def export_gguf(
    model: TinyStoriesForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    quantization: Literal["f32", "f16", "q8_0"],
) -> list[EquivalenceCheck]:
    """Write model.gguf to `folder`, with tokenizer and generation config for transformers, and a Modelfile.

    Returns:
        Two comparisons of the file, loaded by transformers: with the model whose weights are rounded in the
        same way (equal to the bit), and with the model itself (the error of the rounding).

    Raises:
        UserError: llama.cpp does not support the activation or the tokenizer.
        ExportError: the file, loaded again, differs in logits, greedy text or token ids.
    """
    native = native_model(model.float())
    _check_activation(native)
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[native.config.model_type]])
    _add_architecture(writer, native, quantization)
    if data := getattr(native.config, "training_data", None):
        writer.add_string(TRAINING_DATA, json.dumps(data))
    _add_vocabulary(writer, tokenizer, native.config.vocab_size)
    defaults = default_generation_config(model, tokenizer)
    _add_sampling(writer, defaults)
    rounded = _add_weights(writer, native, _TYPES[quantization][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    defaults.save_pretrained(folder)
    write_modelfile(folder, FILE, tokenizer, defaults, model.config.max_position_embeddings)
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_tokenizer(tokenizer, folder)

    # The file requests an end token before each prompt, which some tokenizer classes of transformers add.
    exported_tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    require_same_ids("gguf", tokenizer, exported_tokenizer, add_special_tokens=False)
    kwargs = {"gguf_file": FILE, **read_gguf_facts(folder / FILE).options}
    if native.config.model_type == "gpt2":
        kwargs["activation_function"] = native.config.activation_function
    logger.info("load the file in transformers with from_pretrained(FOLDER, **%r)", kwargs)
    exported = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    rounded_model = native_model(model.float())
    rounded_model.load_state_dict(rounded, strict=False)  # the file does not contain a tied head
    rounded_model.generation_config = exported.generation_config
    return [
        require_equal(
            compare(f"gguf {quantization}, with rounded weights", rounded_model, exported, tokenizer)
        ),
        compare(f"gguf {quantization}, with the model", model, exported, tokenizer),
    ]


def _check_activation(native: PreTrainedModel) -> None:
    config = native.config
    used = config.activation_function if config.model_type == "gpt2" else config.hidden_act
    supported = _ACTIVATIONS[config.model_type]
    if used not in supported:
        raise UserError(
            f"model.hidden_act ({used}): llama.cpp supports only {supported[0]} for {config.model_type}; "
            "use --format native or custom"
        )


def _add_architecture(writer: gguf.GGUFWriter, native: PreTrainedModel, quantization: str) -> None:
    config = native.config
    writer.add_name("tinystories_slm")
    writer.add_file_type(_TYPES[quantization][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        # The reader of transformers ignores gpt2.context_length and assumes 1,024 positions, but accepts the
        # key of another architecture. llama.cpp reads only the keys of the file's architecture.
        writer.add_uint32("llama.context_length", config.n_positions)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "qwen3":
        writer.add_uint32(
            "llama.rope.dimension_count", config.head_dim
        )  # as above: transformers would assume 128


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    backend = require_byte_level_bpe(tokenizer, "gguf")  # llama.cpp selects pre-tokenizers by name
    text_of = {id_: text for text, id_ in tokenizer.get_vocab().items()}
    added = [token["id"] for token in backend["added_tokens"]]
    special = [token["id"] for token in backend["added_tokens"] if token["special"]]
    types = dict.fromkeys(range(vocab_size), gguf.TokenType.UNUSED)
    types |= dict.fromkeys(text_of, gguf.TokenType.NORMAL)
    types |= dict.fromkeys(added, gguf.TokenType.USER_DEFINED) | dict.fromkeys(
        special, gguf.TokenType.CONTROL
    )
    writer.add_tokenizer_model("gpt2")  # the name of llama.cpp for byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text_of.get(id_, f"[PAD{id_}]") for id_ in range(vocab_size)])
    writer.add_token_types([types[id_] for id_ in range(vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    # llama.cpp adds the start token of this file before each prompt; it does not read the template of
    # tokenizer.json, so no prompt gets two.
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _add_sampling(writer: gguf.GGUFWriter, defaults: GenerationConfig) -> None:
    """Write the default sampling parameters of the llama.cpp programs."""
    writer.add_sampling_temp(defaults.temperature)
    writer.add_sampling_top_k(defaults.top_k)
    writer.add_sampling_top_p(defaults.top_p)


def _add_weights(writer: gguf.GGUFWriter, native: PreTrainedModel, dtype: Type) -> dict[str, Tensor]:
    """Write every tensor; return the rounded tensors by their names in `native`."""
    config = native.config
    architecture = _ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    rounded = {}
    for name, weight in native.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp uses the embedding if the file has no head
        conv1d = config.model_type == "gpt2" and name.endswith(_CONV1D)
        rows = (weight.t() if conv1d else weight).contiguous().numpy()
        tensor_dtype = _tensor_dtype(name, rows.shape, dtype)
        data = gguf.quantize(rows, tensor_dtype)
        dequantized = torch.from_numpy(gguf.dequantize(data, tensor_dtype).copy())
        rounded[name] = dequantized.t().contiguous() if conv1d else dequantized
        if config.model_type == "llama" and ".q_proj." in name:
            data = rope_halves_to_pairs(data, config.num_attention_heads)
        elif config.model_type == "llama" and ".k_proj." in name:
            data = rope_halves_to_pairs(data, config.num_key_value_heads)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=tensor_dtype
        )
    return rounded


def _tensor_dtype(name: str, shape: tuple[int, ...], dtype: Type) -> Type:
    """Return the type of one tensor, chosen as in the converter of llama.cpp.

    Vectors and positions are float32; rows that do not divide into Q8_0's blocks of 32 are float16.
    """
    if len(shape) == 1 or ".wpe." in name:
        return Type.F32
    if dtype == Type.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[Type.Q8_0][0]:
        return Type.F16
    return dtype
