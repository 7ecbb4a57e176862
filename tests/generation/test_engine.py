import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_model

from tinystories_slm.errors import UserError
from tinystories_slm.generation import (
    SamplingParams,
    TextStream,
    generate_batch,
    generate_texts,
    prepare_requests,
)

EOS = "<|endoftext|>"


def test_seed_determines_the_text_and_keeps_the_callers_random_state(model_with_tokenizer, tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate_texts(model_with_tokenizer, tokenizer, ["Once"] * 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(2)
    assert first == generate_texts(model_with_tokenizer, tokenizer, ["Once"] * 3, seed=5)
    assert first != generate_texts(model_with_tokenizer, tokenizer, ["Once"] * 3, seed=6)
    assert len(set(first)) == 3
    assert all(text.startswith("Once") for text in first)


def test_prompts_of_different_length_do_not_change_each_others_text(model_with_tokenizer, tokenizer):
    prompts = ["Once upon a time", "The fox", ""]
    options = {"temperature": 0.0, "max_new_tokens": 20}
    together = generate_texts(model_with_tokenizer, tokenizer, prompts, **options)

    assert together == [generate_texts(model_with_tokenizer, tokenizer, [p], **options)[0] for p in prompts]


def test_text_ends_where_the_context_is_full(model_with_tokenizer, tokenizer):
    calls = []
    hook = model_with_tokenizer.register_forward_hook(lambda *_: calls.append(1))
    generate_texts(model_with_tokenizer, tokenizer, ["Once"], max_new_tokens=1000, temperature=0.0)
    hook.remove()
    assert len(calls) == 48 - len([EOS, *tokenizer("Once").input_ids])  # one call per token, no stop token


def test_text_ends_at_the_end_of_text_token(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False, family="llama", scale=1.0)
    with torch.no_grad():  # zero logits: argmax returns id 0, the stop token
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generate_texts(model, tokenizer, ["Once"], temperature=0.0) == ["Once"]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"top_p": 1.5}, r"top_p \(1.5\) must be in \(0, 1\]"),
        ({"top_p": 0.0}, r"top_p \(0.0\)"),
        ({"top_k": -1}, r"top_k \(-1\)"),
        ({"temperature": -0.1}, r"temperature \(-0.1\)"),
        ({"temperature": 1e-9}, r"temperature \(1e-09\).*at least 0.001"),
        ({"temperature": float("nan")}, r"temperature \(nan\)"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
        ({"min_p": 1.5}, r"min_p \(1.5\) must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0.0\)"),
        ({"repetition_penalty": float("nan")}, r"repetition_penalty \(nan\)"),
    ],
)
def test_sampling_parameters_out_of_range_are_rejected(model_with_tokenizer, tokenizer, option, message):
    with pytest.raises(UserError, match=message):
        generate_texts(model_with_tokenizer, tokenizer, ["Once"], **option)


def test_top_k_and_top_p_restrict_the_sampled_tokens(model_with_tokenizer, tokenizer):
    def sampled(**options) -> list[str]:
        return generate_texts(model_with_tokenizer, tokenizer, ["Once"], temperature=2.0, seed=3, **options)

    greedy = generate_texts(model_with_tokenizer, tokenizer, ["Once"], temperature=0.0)
    assert sampled(top_k=1) == greedy
    assert sampled(top_k=0, top_p=1e-6) == greedy
    assert sampled(top_k=0, top_p=1.0) != greedy


def generate(model, tokenizer, requests, sampling, batch_size):
    return list(generate_batch(model, tokenizer, requests, sampling, batch_size=batch_size))


def test_batch_size_and_order_do_not_change_the_text(model_with_tokenizer, tokenizer):
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.3)
    prompts = ["Once upon a time", "The fox", "", "The fox", "Once upon a time there was a fox. The fox", "A"]
    requests = prepare_requests(model_with_tokenizer, tokenizer, prompts, [3, 4, 5, 6, 3, 3], sampling)
    results = generate(model_with_tokenizer, tokenizer, requests, sampling, batch_size=6)

    assert [result.prompt for result in results] == prompts
    assert len({result.text for result in results}) == 6
    assert results == generate(model_with_tokenizer, tokenizer, requests, sampling, batch_size=1)
    assert results == generate(model_with_tokenizer, tokenizer, requests[::-1], sampling, batch_size=4)[::-1]
    for request, result in zip(requests, results, strict=True):
        assert len(request.token_ids) + request.max_new_tokens <= 48
        stream = TextStream(model_with_tokenizer, tokenizer, request, sampling)
        assert ("".join(stream), stream.result) == (result.text, result)
    texts = generate_texts(model_with_tokenizer, tokenizer, ["A", "The fox", "The fox"], seed=9)
    assert texts[1:] == generate_texts(model_with_tokenizer, tokenizer, ["The fox"] * 2, seed=10)


def test_long_prompt_does_not_shorten_the_others_in_its_batch(model_with_tokenizer, tokenizer):
    sampling = SamplingParams(max_new_tokens=1000, temperature=0.0)
    prompts = ["fox " * 10, "The fox", "The fox"]
    sizes = []
    hook = model_with_tokenizer.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    requests = prepare_requests(model_with_tokenizer, tokenizer, prompts, [0, 1, 2], sampling)
    results = generate(model_with_tokenizer, tokenizer, requests, sampling, batch_size=3)
    hook.remove()

    for request, result in zip(requests, results, strict=True):
        assert result.num_new_tokens == request.max_new_tokens == 48 - len(request.token_ids)
    assert set(sizes) == {1, 2}  # the equal prompts share a batch


@pytest.mark.parametrize("backend", ["hf", "torch"])
def test_threads_do_not_change_each_others_text(model_with_tokenizer, tokenizer, monkeypatch, backend):
    own_config = model_with_tokenizer.generation_config

    def generate_one(limit: int) -> str:
        options = {"seed": 3, "max_new_tokens": limit, "backend": backend}
        return generate_texts(model_with_tokenizer, tokenizer, ["Once"], **options)[0]

    alone = [generate_one(limit) for limit in (3, 25)]
    both_began, model_class = threading.Barrier(2), type(model_with_tokenizer)
    generate = model_class.generate

    def wait_and_generate(self, *args, **kwargs):
        both_began.wait(60)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(model_class, "generate", wait_and_generate)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(generate_one, (3, 25))) == alone
    assert model_with_tokenizer.generation_config is own_config


def test_no_requests_give_no_results(model_with_tokenizer, tokenizer):
    assert generate_texts(model_with_tokenizer, tokenizer, []) == []


def test_finish_reason_is_length_or_stop(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False, family="llama", scale=1.0)
    sampling = SamplingParams(max_new_tokens=5, temperature=0.0)
    requests = prepare_requests(model, tokenizer, ["The fox"], [0], sampling)
    [result] = generate(model, tokenizer, requests, sampling, 1)
    assert (result.num_new_tokens, result.finish_reason) == (5, "length")
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    [result] = generate(model, tokenizer, requests, sampling, 1)
    assert (result.num_new_tokens, result.finish_reason, result.text) == (0, "stop", "The fox")
