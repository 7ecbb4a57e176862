"""Generation with the cache compared with one forward pass."""

import copy

import pytest
import torch
from conftest import ignore_the_cache, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from tinystories_slm.generation.cache_check import cache_error, max_cache_error

PROMPT = [0, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_error_is_below_the_limit(model, dtype):
    assert cache_error(copy.deepcopy(model).to(dtype), PROMPT) <= max_cache_error(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_cache_exceeds_the_limit(model, dtype, monkeypatch):
    ignore_the_cache(monkeypatch)
    assert cache_error(model.to(dtype), PROMPT) > 2 * max_cache_error(dtype)


def test_nan_logits_exceed_the_limit():
    model = tiny_model()
    model.lm_head.weight.data[:] = float("nan")
    assert not cache_error(model, PROMPT) <= max_cache_error(torch.float32)


def test_cache_error_of_gpt2_with_a_nearly_full_context():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=6, n_embd=16, n_layer=1, n_head=2)).eval()
    assert cache_error(model, PROMPT) <= 1e-5


def test_a_stop_token_does_not_end_the_comparison(monkeypatch):
    model = tiny_model(family="llama")
    model.generation_config.eos_token_id = model(torch.tensor([PROMPT])).logits[0, -1].argmax().item()
    assert cache_error(model, PROMPT) <= max_cache_error(torch.float32)
    ignore_the_cache(monkeypatch)
    assert cache_error(model, PROMPT) > 0.1


def test_a_prompt_longer_than_the_context_is_shortened():
    model = tiny_model(family="gpt2", max_position_embeddings=6)
    assert cache_error(model, [0, *range(1, 20)]) <= max_cache_error(torch.float32)
