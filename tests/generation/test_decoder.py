"""The decoder compared with transformers' loop: equal text in any batch, equal logits."""

from functools import partial

import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from tinystories_slm.generation import (
    SamplingParams,
    TextStream,
    generate_batch,
    generate_texts,
    prepare_requests,
)
from tinystories_slm.generation.decoder import Decoder, resolve_backend
from tinystories_slm.generation.slot_batch import decode
from tinystories_slm.int8_weights import round_to_int8
from tinystories_slm.kernels.decoding import bindings as kernels

GREEDY = SamplingParams(temperature=0.0)
COMPILED = kernels.load_kernels(torch.float32) is not None
NEEDS_COMPILER = [pytest.mark.compiler, pytest.mark.skipif(not COMPILED, reason="no C compiler")]
BACKENDS = ["torch", pytest.param("cpu", marks=NEEDS_COMPILER)]


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [
        torch.randint(1, 101, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in lengths
    ]


def generate(model, prompts: list[list[int]], limits: list[int], **options) -> list[list[int]]:
    """New tokens of each prompt from `decode`, called through `generate()`."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    options = {"seeds": range(len(prompts)), "sampling": GREEDY, "stop_ids": [-1]} | options
    loop = partial(decode, new_token_limits=limits, **options)
    with torch.no_grad():
        outputs = dict(model.generate(input_ids, attention_mask=mask, max_new_tokens=1, custom_generate=loop))
    return [outputs[index] for index in range(len(prompts))]


def generate_hf(model, ids: list[int], limit: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=limit
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_text_equals_that_of_transformers(model, backend, batch_size):
    prompts = random_prompts([1, 12, 5, 12, 30, 7, 5, 3])
    limits = [20, 36, 1, 9, 18, 40, 13, 2]  # two of them fill the context of 48
    expected = [generate_hf(model, ids, limit) for ids, limit in zip(prompts, limits, strict=True)]

    assert generate(model, prompts, limits, batch_size=batch_size, backend=backend) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_ends_at_any_stop_token_and_frees_its_slot(model, backend, monkeypatch):
    prompts, limits = random_prompts([4, 9, 4, 6, 2]), [30] * 5
    full = generate(model, prompts, limits, batch_size=5, backend=backend)
    stop_ids = {full[0][3], full[1][7], full[4][2]}
    sizes = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids, at: sizes.append(len(ids)) or step(self, ids, at))

    stopped = generate(model, prompts, limits, batch_size=2, backend=backend, stop_ids=stop_ids)
    for full_ids, stopped_ids in zip(full, stopped, strict=True):
        at = next((at for at, token in enumerate(full_ids) if token in stop_ids), len(full_ids) - 1)
        assert stopped_ids == full_ids[: at + 1]
    assert sum(sizes) == sum(map(len, stopped)) - 5  # no step computes a finished sequence
    assert set(sizes) <= {1, 2}


@pytest.mark.parametrize("backend", ["hf", *BACKENDS])
def test_seed_gives_the_same_text_on_any_backend_in_any_batch(model_with_tokenizer, tokenizer, backend):
    sampling = SamplingParams(max_new_tokens=40, top_k=30, min_p=0.001, repetition_penalty=1.3)
    prompts = ["Once upon a time", "The fox", "", "The fox", "Once upon a time there was a fox. The fox", "A"]
    requests = prepare_requests(model_with_tokenizer, tokenizer, prompts, [3, 4, 5, 6, 3, 3], sampling)
    expected = list(
        generate_batch(model_with_tokenizer, tokenizer, requests, sampling, batch_size=1, backend="hf")
    )
    assert len({result.text for result in expected}) == 6

    for batch_size in (1, 2, 6):
        results = generate_batch(
            model_with_tokenizer, tokenizer, requests, sampling, batch_size=batch_size, backend=backend
        )
        assert list(results) == expected
    for request, result in zip(requests, expected, strict=True):
        stream = TextStream(model_with_tokenizer, tokenizer, request, sampling, backend=backend)
        assert ("".join(stream), stream.result) == (result.text, result)


def decoder_logits(model, ids: list[int], backend: str) -> torch.Tensor:
    """Logits (2, T - 1, V) after each token but the first: with one active slot, and in the second of two."""
    with torch.inference_mode():
        decoder = Decoder(model, 2, len(ids), backend)
        decoder.prefill(ids[:1], [0, 1])
        single = [decoder.step([ids[at]], [at])[0].clone() for at in range(1, len(ids))]
        second = [decoder.step([ids[at]] * 2, [at] * 2)[1] for at in range(1, len(ids))]
    return torch.stack([torch.stack(single), torch.stack(second)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_logits_equal_those_of_the_model(family, backend):
    [ids] = random_prompts([40])
    exact = tiny_model(**family)
    with torch.no_grad():
        expected = exact(torch.tensor([ids])).logits[0, 1:]
        rounded = tiny_model(**family).bfloat16()
        theirs = (rounded(torch.tensor([ids])).logits[0, 1:].float() - expected).square().mean().sqrt()

    assert (decoder_logits(exact, ids, backend) - expected).abs().max() < 2e-5  # logits reach 3.4
    # bfloat16: the model's forward pass rounds more often, so the decoder must not differ more from float32.
    ours = (decoder_logits(rounded, ids, backend) - expected).square().mean(dim=(1, 2)).sqrt()
    assert theirs < 0.02 and bool((ours < 1.1 * theirs).all()), (ours, theirs)


@pytest.mark.compiler
@pytest.mark.skipif(not COMPILED, reason="no C compiler")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4], ids="{} threads".format)  # 3 threads share heads
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_kernel_logits_do_not_depend_on_the_number_of_threads(family, num_threads):
    [ids] = random_prompts([12])
    model, threads = tiny_model(**family), torch.get_num_threads()
    expected = decoder_logits(model, ids, "cpu")
    try:
        torch.set_num_threads(num_threads)
        assert (decoder_logits(model, ids, "cpu") - expected).abs().max() < 1e-5
    finally:
        torch.set_num_threads(threads)


@pytest.mark.compiler
@pytest.mark.skipif(not COMPILED, reason="no C compiler")
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_int8_kernel_computes_with_the_rounded_weights(family):
    [ids] = random_prompts([40])
    model = tiny_model(**family)
    with torch.no_grad():
        exact = model(torch.tensor([ids])).logits[0, 1:]
        round_to_int8(model)
        rounded = model(torch.tensor([ids])).logits[0, 1:]
    one, in_batch = decoder_logits(model, ids, "cpu")
    assert (in_batch - rounded).abs().max() < 2e-5  # logits reach 3.4
    # Alone, activations have 12 bits: their errors are a tenth of those of the weights.
    errors = [(logits - rounded).square().mean().sqrt() for logits in (one, exact)]
    assert 1e-6 < errors[0] < 0.1 * errors[1] < 0.01, errors


@pytest.mark.compiler
@pytest.mark.skipif(not COMPILED, reason="no C compiler")
def test_kernel_attention_over_several_blocks_equals_that_of_the_model():
    model = tiny_model(family="llama", max_position_embeddings=700)
    [ids] = random_prompts([600])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, 1:]
    assert (decoder_logits(model, ids, "cpu") - expected).abs().max() < 5e-5


def test_decode_disables_dropout_and_restores_the_training_mode():
    model = tiny_model(dropout=0.5)
    expected = generate_hf(model, [5, 6], 20)
    model.train()
    assert generate(model, [[5, 6]], [20], batch_size=1, backend="torch") == [expected]
    assert model.training


def test_resolve_backend_returns_the_fastest_that_supports_the_model():
    best = "cpu" if COMPILED else "torch"
    assert resolve_backend(tiny_model())[0] == best
    assert resolve_backend(tiny_model(), "torch") == ("torch", "as requested")
    assert resolve_backend(tiny_model(), "hf") == ("hf", "as requested")
    foreign = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    reason = "GPT2LMHeadModel is not a model class of this project"
    assert resolve_backend(foreign, "cpu") == ("hf", reason)
    hooked = tiny_model()
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert resolve_backend(hooked) == ("hf", "model.layers.0.mlp has a hook")
    adapted = tiny_model()
    adapted.model.layers[1].self_attn.q_proj = type("Adapter", (torch.nn.Linear,), {})(32, 32)
    reason = "model.layers.1.self_attn.q_proj is not a plain torch.nn.Linear"
    assert resolve_backend(adapted) == ("hf", reason)
    assert resolve_backend(tiny_model().half())[0] == "hf"
    assert resolve_backend(tiny_model(hidden_act="gelu"))[0] == "torch"


@pytest.mark.parametrize("compiler", ["absent", "false"])
def test_torch_backend_replaces_the_kernels_without_a_working_compiler(
    model_with_tokenizer, tokenizer, compiler, monkeypatch, tmp_path, caplog
):
    expected = generate_texts(model_with_tokenizer, tokenizer, ["Once"], seed=0)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load_kernels.cache_clear()
    try:
        assert resolve_backend(model_with_tokenizer) == ("torch", "no working C compiler")
        assert generate_texts(model_with_tokenizer, tokenizer, ["Once"], seed=0) == expected
    finally:
        kernels.load_kernels.cache_clear()
    assert "using torch instead" in caplog.text and caplog.text.count("\n") == 1


@pytest.mark.compiler
@pytest.mark.skipif(not COMPILED, reason="no C compiler")
def test_kernels_compile_once_and_keep_the_rounding_mode_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load_kernels.cache_clear()
    try:
        assert kernels.load_kernels(torch.float32) is not None
        [library] = (tmp_path / "tinystories_slm").iterdir()
        compiled_ns = library.stat().st_mtime_ns
        kernels.load_kernels.cache_clear()
        assert kernels.load_kernels(torch.float32) is not None
        assert library.stat().st_mtime_ns == compiled_ns
    finally:
        kernels.load_kernels.cache_clear()
    assert (torch.tensor([1e-40]) * 0.5).item() > 0.0  # linking with -ffast-math would flush subnormals to 0
