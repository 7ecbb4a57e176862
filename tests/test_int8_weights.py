import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from tinystories_slm.errors import UserError
from tinystories_slm.int8_weights import has_int8_weights, int8_rows, round_to_int8


@given(st.integers(0, 2**32), st.floats(1e-8, 1e4))
def test_rows_are_within_half_a_level_and_rounding_again_changes_nothing(seed, scale):
    weight = scale * torch.randn(5, 33, generator=torch.Generator().manual_seed(seed))
    weight[2] = 0
    levels, scales = int8_rows(weight)
    rounded = levels * scales[:, None]
    assert levels.dtype == torch.int8 and levels.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127]
    assert bool(((rounded - weight).abs() <= 0.5001 * scales[:, None]).all())
    assert torch.equal(int8_rows(rounded)[0], levels)


def test_each_matrix_is_rounded_once_and_vectors_stay():
    model = tiny_model(family="gpt2", bias=True)
    plain = tiny_model(family="gpt2", bias=True)
    assert not has_int8_weights(model)
    round_to_int8(model)
    assert has_int8_weights(model) and model.lm_head.weight is model.model.embed_tokens.weight
    for (name, weight), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, exact) == (weight.ndim < 2), name
        if weight.ndim == 2:
            assert len(weight[0].unique()) <= 255
            assert torch.equal(weight, int8_rows(exact)[0] * int8_rows(exact)[1][:, None])


def test_matrices_in_other_layers_are_rejected():
    network = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=4))
    with pytest.raises(UserError, match=r"^dtype \(int8\): transformer.h.0.attn.c_attn is a Conv1D"):
        round_to_int8(network)
    assert not has_int8_weights(network)
