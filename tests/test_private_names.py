"""Private names of other libraries that this project calls or overrides.

Private names change without a deprecation. Each has its own check, so that the failing test names it.
"""

import inspect

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.distributed import distributed_c10d
from transformers import GenerationMixin, PreTrainedModel, TextIteratorStreamer
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinystories_slm.model import CACHE_NAME
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM

NEWER = pytest.mark.skipif(
    CACHE_NAME != "cache", reason="the name exists only in newer versions of transformers"
)
METHODS = [
    (GenerationMixin, "_prepare_generated_length", {"generation_config", "has_default_max_length"}),
    (
        GenerationMixin,
        "_prepare_cache_for_generation",
        {"generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"},
    ),
    (PreTrainedModel, "_init_weights", {"module"}),
    (PreTrainedModel, "_from_config", {"config"}),
    (TextIteratorStreamer, "_is_chinese_char", {"cp"}),
    (TextIteratorStreamer, "on_finalized_text", {"text"}),
    (AcceleratorState, "_reset_state", set()),
    (distributed_c10d, "_set_pg_timeout", {"timeout"}),
    (distributed_c10d, "_get_default_store", set()),
    (torch, "_foreach_lerp", set()),
    (torch, "_foreach_lerp_", set()),
]


@pytest.mark.parametrize(("owner", "name", "parameters"), METHODS, ids=[name for _, name, _ in METHODS])
def test_method_exists_with_its_parameters(owner, name, parameters):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} no longer exists; find its replacement"
    if parameters:
        missing = parameters - set(inspect.signature(method).parameters)
        assert not missing, f"{owner.__name__}.{name} no longer takes {missing}"


@pytest.mark.parametrize("name", ["_prepare_generated_length", "_prepare_cache_for_generation"])
def test_generate_calls_the_overridden_method(name, monkeypatch):
    calls = []
    original = getattr(TinyStoriesForCausalLM, name)
    monkeypatch.setattr(
        TinyStoriesForCausalLM, name, lambda *a, **k: (calls.append(name), original(*a, **k))[1]
    )
    model = TinyStoriesForCausalLM(TinyStoriesConfig(vocab_size=11, hidden_size=8, num_attention_heads=2))
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=1)
    assert calls == [name], f"generate() no longer calls {name}"


@pytest.mark.parametrize(
    "name",
    [
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_supports_flash_attn",
        "_supports_sdpa",
        "_supports_flex_attn",
        "_supports_attention_backend",
        "_can_compile_fullgraph",
        "_can_record_outputs",
        "_tied_weights_keys",
        "_tp_plan",
        "_pp_plan",
        pytest.param("_fsdp_plan", marks=NEWER),
    ],
)
def test_class_attribute_is_read_by_transformers(name):
    assert hasattr(PreTrainedModel, name), f"PreTrainedModel.{name} no longer exists: our value has no effect"


def test_attention_functions_are_found_by_name():
    model = TinyStoriesForCausalLM(TinyStoriesConfig(vocab_size=11, hidden_size=8, num_attention_heads=2))
    assert model.config._attn_implementation == "sdpa"
    assert callable(ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None))


def test_device_placement_skips_the_cache_argument():
    assert CACHE_NAME in TinyStoriesForCausalLM._skip_keys_device_placement
    assert CACHE_NAME in TinyStoriesConfig.keys_to_ignore_at_inference


def test_streamer_has_the_attributes_that_ours_reads():
    streamer = TextIteratorStreamer(None)
    for name in ("token_cache", "print_len", "decode_kwargs"):
        assert hasattr(streamer, name), f"TextIteratorStreamer.{name} no longer exists"


def test_modules_have_the_hook_attributes_that_the_decoder_reads():
    module = torch.nn.Linear(1, 1)
    assert hasattr(module, "_forward_hooks") and hasattr(module, "_forward_pre_hooks")
    assert hasattr(GenerationConfig(), "max_length")
