"""Export format `native`: the same weights as the GPT-2, Llama or Qwen3 class of transformers."""

import copy
import json
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tinystories_slm.data.tokenizer import load_tokenizer, save_tokenizer
from tinystories_slm.export.checks import (
    MAX_DIFFERENCE_16_BIT,
    EquivalenceCheck,
    ExportError,
    compare,
    require_equal,
    require_same_ids,
)
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.model_folder import default_generation_config


def export_native(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[EquivalenceCheck]:
    """Write to `folder` what `from_pretrained(folder)` loads without any code of this project.

    Raises:
        ExportError: the folder, loaded again, differs in logits, greedy text or token ids: in float32 by a
            single bit, in bfloat16 by more than `MAX_DIFFERENCE_16_BIT`.
    """
    native = native_model(model)
    native.generation_config = default_generation_config(model, tokenizer)
    native.save_pretrained(folder)
    _write_v4_rope_theta(folder / "config.json")
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_tokenizer(tokenizer, folder)

    require_same_ids("native", tokenizer, load_tokenizer(str(folder)))
    return [
        _compare_saved(model, type(native), tokenizer, folder, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def native_model(model: TinyStoriesForCausalLM) -> PreTrainedModel:
    """Return `model` as a `GPT2LMHeadModel`, `LlamaForCausalLM` or `Qwen3ForCausalLM`, in evaluation mode.

    Save the result, or run it in float32 only: in other types its RoPE table is rounded, unlike that of a
    model loaded from disk.
    """
    config = model.config
    if config.family == "gpt2":
        native = GPT2LMHeadModel(_gpt2_config(config))
        weights = _gpt2_weights(model)
    else:
        native = (Qwen3ForCausalLM if config.qk_norm else LlamaForCausalLM)(_llama_config(config))
        weights = model.state_dict()
    native.load_state_dict(weights, strict=True)
    return native.to(model.dtype).eval()


def rope_halves_to_pairs(rows: NDArray, num_heads: int) -> NDArray:
    """Reorder the rows (num_heads x D, ...) of each head from halves to pairs.

    The `llama` architecture of llama.cpp, and llama2.c, rotate (x[2i], x[2i+1]) where this model rotates
    (x[i], x[i + D/2]). `qwen3` of llama.cpp rotates as this model does.
    """
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _gpt2_config(config: TinyStoriesConfig) -> GPT2Config:
    return GPT2Config(
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.norm_eps,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        **_shared_kwargs(config),
    )


def _llama_config(config: TinyStoriesConfig) -> LlamaConfig | Qwen3Config:
    kwargs = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": config.bias,
        "attention_dropout": config.dropout,
        **_shared_kwargs(config),
    }
    return Qwen3Config(**kwargs) if config.qk_norm else LlamaConfig(**kwargs, mlp_bias=config.bias)


def _shared_kwargs(config: TinyStoriesConfig) -> dict[str, object]:
    names = (
        "vocab_size",
        "initializer_range",
        "tie_word_embeddings",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    shared = {name: getattr(config, name) for name in names}
    records = ("training_data", "training_step")  # what the weights come from; see `evaluation.training_data`
    return shared | {name: getattr(config, name) for name in records if hasattr(config, name)}


def _gpt2_weights(model: TinyStoriesForCausalLM) -> dict[str, Tensor]:
    """Return the state dict for GPT-2: (in, out) matrices, joint queries, keys and values, all biases."""
    base = model.model
    weights = {
        "transformer.wte.weight": base.embed_tokens.weight,
        "transformer.wpe.weight": base.embed_positions.weight,
        "lm_head.weight": model.lm_head.weight,
        **_with_bias("transformer.ln_f", base.norm),
    }
    for i, layer in enumerate(base.layers):
        attention, mlp, block = layer.self_attn, layer.mlp, f"transformer.h.{i}"
        weights |= _with_bias(f"{block}.ln_1", layer.input_layernorm)
        weights |= _with_bias(f"{block}.ln_2", layer.post_attention_layernorm)
        weights |= _to_conv1d(f"{block}.attn.c_attn", attention.q_proj, attention.k_proj, attention.v_proj)
        weights |= _to_conv1d(f"{block}.attn.c_proj", attention.o_proj)
        weights |= _to_conv1d(f"{block}.mlp.c_fc", mlp.up_proj)
        weights |= _to_conv1d(f"{block}.mlp.c_proj", mlp.down_proj)
    return {name: weight.detach() for name, weight in weights.items()}


def _with_bias(name: str, norm: nn.LayerNorm) -> dict[str, Tensor]:
    # Adding zero is exact, so a model without biases equals a GPT-2 with zero biases.
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return {f"{name}.weight": norm.weight, f"{name}.bias": bias}


def _to_conv1d(name: str, *linears: nn.Linear) -> dict[str, Tensor]:
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in linears
    ]
    weight = torch.cat([linear.weight for linear in linears]).t().contiguous()  # (in, out)
    return {f"{name}.weight": weight, f"{name}.bias": torch.cat(biases)}


def _write_v4_rope_theta(path: Path) -> None:
    """Write the RoPE base also as `rope_theta`, the name that transformers 4 and vLLM read.

    Without it they use 10,000, whatever base the model was trained with.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("rope_parameters"):
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compare_saved(
    model: TinyStoriesForCausalLM,
    native_class: type[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
) -> EquivalenceCheck:
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if type(exported) is not native_class:
        raise ExportError(f"{folder} loads as {type(exported).__name__}, not as {native_class.__name__}")
    expected = model if dtype == model.dtype else copy.deepcopy(model).to(dtype)
    name = f"{native_class.__name__}, {str(dtype).removeprefix('torch.')}"
    # In 16 bits one joint product for queries, keys and values may round differently from three.
    bound = 0.0 if dtype == torch.float32 else MAX_DIFFERENCE_16_BIT
    return require_equal(compare(name, expected, exported, tokenizer, max_relative_difference=bound))
