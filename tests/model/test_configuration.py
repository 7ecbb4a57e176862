import json

import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig


def test_nanogpt_names_work_as_arguments_and_attributes():
    config = TinyStoriesConfig(n_layer=3, n_head=2, n_embd=64, block_size=99)

    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 2)
    assert (config.hidden_size, config.max_position_embeddings) == (64, 99)
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (3, 2, 64, 99)
    assert config.intermediate_size == 256  # derived from n_embd, not from the default hidden_size
    assert config.head_dim == 32


@given(
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 16).map(lambda half: 2 * half),
    layers=st.integers(1, 4),
    family=st.sampled_from(["gpt2", "llama"]),
    bias=st.booleans(),
)
def test_config_survives_a_json_round_trip(heads, head_dim, layers, family, bias):
    config = TinyStoriesConfig(
        family=family, bias=bias, n_layer=layers, n_head=heads, n_embd=heads * head_dim
    )
    loaded = TinyStoriesConfig.from_dict(json.loads(config.to_json_string()))

    assert loaded.to_dict() == config.to_dict()
    assert loaded.intermediate_size == config.intermediate_size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, r"hidden_size \(100\).*num_attention_heads \(3\)"),
        ({"num_attention_heads": 0}, r"num_attention_heads \(0\)"),
        ({"num_hidden_layers": 10**400}, r"num_hidden_layers \(1000.*at most 10000"),
        ({"intermediate_size": 0}, r"intermediate_size \(0\).*no class holds a model of attention alone"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"family": "gpt2", "num_key_value_heads": 2}, r"num_key_value_heads \(2\).*family=llama"),
        ({"family": "gpt2", "qk_norm": True}, "qk_norm.*family=llama"),
        ({"family": "gpt2", "hidden_act": "silu"}, "hidden_act.*'silu'"),
        ({"family": "llama", "hidden_act": "relu3"}, "hidden_act.*'relu3'"),
        ({"family": "llama", "qk_norm": True, "bias": True}, "qk_norm.*bias.*no class"),
        ({"family": "llama", "hidden_size": 24, "num_attention_heads": 8}, r"head_dim \(3\).*even"),
        ({"family": "llama", "num_key_value_heads": 3}, r"num_key_value_heads \(3\)"),
        (
            {
                "family": "llama",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
            "rope_type.*'linear'",
        ),
    ],
)
def test_config_rejects_an_unsupported_architecture(overrides, message):
    with pytest.raises(Exception, match=message):
        TinyStoriesConfig(**overrides)


def test_config_rejects_a_wrong_type():
    with pytest.raises(Exception, match="hidden_size"):
        TinyStoriesConfig(hidden_size="64")


def test_preset_shape_has_the_documented_number_of_parameters():
    # Without biases: embeddings of tokens and positions, 12 x 256^2 + 2 norms a layer, the final norm.
    expected = 10_000 * 256 + 256 * 256 + 8 * (12 * 256**2 + 2 * 256) + 256
    model = tiny_model(
        vocab_size=10_000,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=256,
    )

    assert model.num_parameters() == expected == 8_921_344
