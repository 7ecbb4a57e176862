"""`gguf`: one file for llama.cpp and what is built on it, with weights, architecture and vocabulary."""

import json
import logging
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
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
from tinystories_slm.errors import InputError
from tinystories_slm.export.checks import Check, compare, require_equal, require_same_ids
from tinystories_slm.export.native import native_model
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import generation_defaults

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
# llama.cpp computes one activation per architecture, whatever the file says; gelu_new is the same curve.
_ACTIVATIONS = {"gpt2": ("gelu_pytorch_tanh", "gelu_new"), "llama": ("silu",), "qwen3": ("silu",)}
# GPT-2's matrices lie (in, out) in transformers; ggml wants (out, in), as of any other linear layer.
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def export_gguf(
    model: TinyStoriesForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    quantization: Literal["f32", "f16", "q8_0"],
) -> list[Check]:
    """Fill `folder` with model.gguf, and the tokenizer and generation defaults in transformers' own files.

    Returns:
        Two comparisons of the file, read back by transformers: with the model's weights rounded as the
        file rounds them (equal to the bit), and with the model itself (what the rounding costs).

    Raises:
        InputError: an activation or a tokenizer that llama.cpp does not compute.
        ExportError: the file, read back, has other logits, greedy story or token ids.
    """
    native = native_model(model.float())
    _refuse_activation(native)
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[native.config.model_type]])
    _add_architecture(writer, native, quantization)
    _add_vocabulary(writer, tokenizer, native.config.vocab_size)
    _add_sampling(writer, generation_defaults(model, tokenizer))
    rounded = _add_weights(writer, native, _TYPES[quantization][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    generation_defaults(model, tokenizer).save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_tokenizer(tokenizer, folder)

    # The file asks for an end of text before each prompt, which some of transformers' classes then add.
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    require_same_ids("gguf", tokenizer, theirs, add_special_tokens=False)
    settings = {"gguf_file": FILE, **reader_settings(native)}
    logger.info("transformers reads it with from_pretrained(FOLDER, **%r)", settings)
    again = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    stored = native_model(model.float())
    stored.load_state_dict(rounded, strict=False)  # a tied head is not stored
    return [
        require_equal(
            compare(f"gguf {quantization}, with the weights rounded alike", stored, again, tokenizer)
        ),
        compare(f"gguf {quantization}, with the model", model, again, tokenizer),
    ]


def reader_settings(native: PreTrainedModel) -> dict[str, object]:
    """What `from_pretrained` has to be told besides `gguf_file` to compute exactly what the file says.

    transformers' reader takes GPT-2's activation and the presence of Llama's biases for granted.
    llama.cpp needs none of it.
    """
    config = native.config
    if config.model_type == "gpt2":
        # Its default, gelu_new, is the same curve in another order of operations: 1e-6 off.
        settings = {"activation_function": config.activation_function}
        return settings if config.n_inner == 4 * config.n_embd else settings | {"n_inner": config.n_inner}
    if config.model_type == "llama" and config.attention_bias:
        return {"attention_bias": True, "mlp_bias": True}
    return {}


def _refuse_activation(native: PreTrainedModel) -> None:
    config = native.config
    used = config.activation_function if config.model_type == "gpt2" else config.hidden_act
    known = _ACTIVATIONS[config.model_type]
    if used not in known:
        raise InputError(
            f"hidden_act ({used}) of the model is not what llama.cpp computes for {config.model_type} "
            f"({known[0]}); use --format native or custom"
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
        # transformers' reader drops GPT-2's own key of that name and assumes 1,024 positions, but takes
        # any architecture's. llama.cpp reads a file's own architecture only.
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
        writer.add_uint32("llama.rope.dimension_count", config.head_dim)  # likewise: it would assume 128


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_tokenizer(backend)
    text_of = {id_: text for text, id_ in tokenizer.get_vocab().items()}
    added = [token["id"] for token in backend["added_tokens"]]
    special = [token["id"] for token in backend["added_tokens"] if token["special"]]
    types = dict.fromkeys(range(vocab_size), gguf.TokenType.UNUSED)
    types |= dict.fromkeys(text_of, gguf.TokenType.NORMAL)
    types |= dict.fromkeys(added, gguf.TokenType.USER_DEFINED) | dict.fromkeys(
        special, gguf.TokenType.CONTROL
    )
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text_of.get(id_, f"[PAD{id_}]") for id_ in range(vocab_size)])
    writer.add_token_types([types[id_] for id_ in range(vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(
        tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    )
    writer.add_pad_token_id(
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    # Every story of the training followed an end of text: llama.cpp then puts one before each prompt.
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _add_sampling(writer: gguf.GGUFWriter, defaults: GenerationConfig) -> None:
    """What llama.cpp's own programs then take where no flag says otherwise."""
    writer.add_sampling_temp(defaults.temperature)
    writer.add_sampling_top_k(defaults.top_k)
    writer.add_sampling_top_p(defaults.top_p)


def _refuse_tokenizer(backend: dict) -> None:
    """llama.cpp knows pre-tokenizers by name; ours is GPT-2's, and any other would need its own name."""
    model, pieces = backend["model"], backend["pre_tokenizer"] or {}
    plain = {
        "model": model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("ignore_merges"),
        "normalizer": backend["normalizer"] is None,
        "pre_tokenizer": pieces.get("type") == "ByteLevel"
        and pieces.get("use_regex", True)
        and not pieces.get("add_prefix_space"),
    }
    if wrong := [name for name, good in plain.items() if not good]:
        raise InputError(
            f"the tokenizer's {' and '.join(wrong)} is not that of GPT-2's byte-level BPE, the only one that "
            "is written to gguf; use --format native and llama.cpp's own converter"
        )


def _add_weights(writer: gguf.GGUFWriter, native: PreTrainedModel, wanted: Type) -> dict[str, Tensor]:
    """Write every tensor; returns them, under their names in `native`, as the file rounds them."""
    config = native.config
    architecture = _ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    rounded = {}
    for name, weight in native.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where no head is stored
        conv1d = config.model_type == "gpt2" and name.endswith(_CONV1D)
        rows = (weight.t() if conv1d else weight).contiguous().numpy()
        stored_as = _type_of(name, rows.shape, wanted)
        data = gguf.quantize(rows, stored_as)
        back = torch.from_numpy(gguf.dequantize(data, stored_as).copy())
        rounded[name] = back.t().contiguous() if conv1d else back
        if config.model_type == "llama" and ".q_proj." in name:
            data = _interleave(data, config.num_attention_heads)
        elif config.model_type == "llama" and ".k_proj." in name:
            data = _interleave(data, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored_as)
    return rounded


def _type_of(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """As llama.cpp's converter does: float32 for vectors and positions, and float16 for rows that do
    not divide into Q8_0's blocks of 32."""
    if len(shape) == 1 or ".wpe." in name:
        return Type.F32
    if wanted == Type.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[Type.Q8_0][0]:
        return Type.F16
    return wanted


def _interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs: llama.cpp turns (x[2i], x[2i+1]) where we turn
    (x[i], x[i + D/2]). Of its architectures llama does so, qwen3 does as we do."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
