"""Configuration of a TinyStories model, with validation.

The Hub stores this file with the weights (remote code): it imports nothing of `tinystories_slm`.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

_MAX_LAYERS = 10_000
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)

# Family names in the config.json of earlier versions.
_EARLIER_FAMILIES = {"gpt": "gpt2", "modern": "llama"}


@strict
class TinyStoriesConfig(PreTrainedConfig):
    """A decoder-only transformer in one of two families.

    - `family="gpt2"`: learned positions, LayerNorm, GELU (tanh), a feed-forward layer of 4 x hidden;
      the mathematics of GPT-2 (Radford et al., 2019).
    - `family="llama"`: rotary positions (Su et al., arXiv 2104.09864), RMSNorm, SwiGLU (Shazeer,
      arXiv 2002.05202), optionally grouped-query attention; the mathematics of Llama, or of Qwen3
      with `qk_norm`.

    Both are pre-norm with tied embeddings by default. nanoGPT's names (`n_layer`, `n_head`, `n_embd`,
    `block_size`) also work, as arguments and as attributes.

    Raises:
        ValueError: (as huggingface_hub's strict-dataclass error) an invalid combination, or one that no model
            class of transformers supports.
    """

    model_type = "tinystories_slm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # since transformers 5.24, and before
    attribute_map = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "block_size": "max_position_embeddings",
    }
    # Tensor- and pipeline-parallel plans of the modules of both families; each instance adds its others.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 10_000
    family: Literal["gpt2", "llama", "gpt", "modern"] = "gpt2"
    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str | None = None
    max_position_embeddings: int = 256
    bias: bool = False
    qk_norm: bool = False
    dropout: float | int = 0.0
    norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict | None = None
    initializer_range: float = 0.02
    zero_init_residual: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        self.family = _EARLIER_FAMILIES.get(self.family, self.family)
        # Resolve nanoGPT's names first: the defaults below are derived from these fields.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = (
                _swiglu_size(self.hidden_size) if self.has_gated_mlp else 4 * self.hidden_size
            )
        if self.hidden_act is None:
            self.hidden_act = "silu" if self.has_gated_mlp else "gelu_pytorch_tanh"
        super().__post_init__(**kwargs)
        if not self.has_rope:
            self.rope_parameters = None  # the parent class sets it wherever it is declared
        self._set_parallel_plans()

    # What a family consists of. Other code reads these properties, not the name of the family.

    @property
    def has_rope(self) -> bool:
        """Whether positions are rotary (RoPE); if not, the model learns one embedding per position."""
        return self.family == "llama"

    @property
    def has_gated_mlp(self) -> bool:
        """Whether the feed-forward layer multiplies two projections, as SwiGLU does."""
        return self.family == "llama"

    @property
    def has_rms_norm(self) -> bool:
        """Whether norms are RMSNorm; if not, LayerNorm."""
        return self.family == "llama"

    def _set_parallel_plans(self):
        """Add this family's modules to the plans; a module that does not exist makes a plan invalid."""
        if not self.has_rope:
            # Positions are added between two stages; a pipeline plan cannot express that.
            self.base_model_pp_plan = None
            return
        self.base_model_tp_plan = self.base_model_tp_plan | {"layers.*.mlp.gate_proj": "colwise"}
        if self.qk_norm:
            self.base_model_tp_plan |= {
                "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
                "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
            }

    def validate_architecture(self):
        """Reject invalid combinations; `@strict` calls it after `__post_init__`."""
        if self.intermediate_size == 0:
            raise ValueError(
                "intermediate_size (0) must be at least 1: GPT-2, Llama and Qwen3 have a feed-forward layer, "
                "so no class holds a model of attention alone; use 1 for the smallest"
            )
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.num_hidden_layers > _MAX_LAYERS:  # a damaged file; building the layers would take all memory
            raise ValueError(
                f"num_hidden_layers ({str(self.num_hidden_layers)[:20]}) must be at most {_MAX_LAYERS}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}); change either"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}); change either"
            )
        if not 0.0 <= self.initializer_range <= 1.0:
            raise ValueError(f"initializer_range ({self.initializer_range}) must be in [0, 1]; use 0.02")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout ({self.dropout}) must be in [0, 1)")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act ({self.hidden_act!r}) must be an activation of transformers (ACT2FN)"
            )
        self._validate_gpt2() if self.family == "gpt2" else self._validate_llama()

    def _validate_gpt2(self):
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must equal num_attention_heads "
                f"({self.num_attention_heads}) in the gpt2 family, as in GPT-2; use family=llama for "
                "grouped-query attention"
            )
        if self.qk_norm:
            raise ValueError(
                "qk_norm (True) requires the llama family (Qwen3), as GPT-2 has no QK-norm; use family=llama"
            )
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be hidden_size / num_attention_heads "
                f"({self.hidden_size} / {self.num_attention_heads}) in the gpt2 family, as in GPT-2"
            )
        if not self.hidden_act.startswith("gelu"):
            raise ValueError(
                f"hidden_act ({self.hidden_act!r}) must be a GELU in the gpt2 family; use gelu_pytorch_tanh"
            )

    def _validate_llama(self):
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even for rotary positions; change hidden_size "
                f"({self.hidden_size}) or num_attention_heads ({self.num_attention_heads})"
            )
        if self.qk_norm and self.bias:
            raise ValueError(
                "qk_norm (True) with bias (True) has no class in transformers (Qwen3's feed-forward has no "
                "biases); set one of them to False"
            )
        if not (self.rope_parameters or {}).get("rope_theta", 1.0) >= 1.0:
            raise ValueError(
                f"rope_theta ({self.rope_parameters['rope_theta']}) must be at least 1; use 10000"
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(
                f"rope_type ({rope_type!r}) must be 'default': scaled rotary positions are not supported"
            )


def _swiglu_size(hidden_size: int) -> int:
    """8/3 x hidden, rounded up to a multiple of 32: three matrices then cost as much as GPT-2's two."""
    return -(-8 * hidden_size // (3 * 32)) * 32


__all__ = ["TinyStoriesConfig"]
