"""transformers' `generate()` and pipelines with our model: caches, padding, the end of the context."""

import logging

import pytest
import torch
from conftest import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast, pipeline

# No token has id -1: a stop token that never occurs. (None breaks prompt lookup in transformers 5.10.)
GREEDY = {"do_sample": False, "eos_token_id": -1}


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy_continuation(model, prompt: torch.Tensor, num_new_tokens: int) -> torch.Tensor:
    """Return the greedy continuation by definition: a forward over the whole text per token, no cache."""
    for _ in range(num_new_tokens):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generate_ignores_left_padding(model, implementation, cache):
    model.set_attn_implementation(implementation)
    short, long = ids(4), ids(11)
    batch = torch.cat([torch.nn.functional.pad(short, (7, 0)), long])
    mask = torch.tensor([[0] * 7 + [1] * 4, [1] * 11])
    generated = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=10,
        **GREEDY,
        **({"use_cache": False} if cache == "none" else {"cache_implementation": cache}),
    )

    assert generated[0, 7:].tolist() == greedy_continuation(model, short, 10)[0].tolist()
    assert generated[1].tolist() == greedy_continuation(model, long, 10)[0].tolist()


def test_all_greedy_decoding_methods_generate_the_same_text(model):
    prompt = ids(6)
    expected = greedy_continuation(model, prompt, 12).tolist()
    embeds = model.get_input_embeddings()(prompt)

    assert model.generate(prompt, max_new_tokens=12, **GREEDY).tolist() == expected
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=12, **GREEDY)
    assert generated.tolist() == [expected[0][6:]]
    assistant = tiny_model(seed=1, family=model.config.family)
    generated = model.generate(prompt, assistant_model=assistant, max_new_tokens=12, **GREEDY)
    assert generated.tolist() == expected
    generated = model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=12, **GREEDY)
    assert generated.tolist() == expected


@pytest.mark.filterwarnings("error::FutureWarning")
def test_generate_logs_no_deprecation_warning(model, caplog):
    logging.getLogger("transformers").propagate = True
    prompt = ids(6)
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 5, "top_p": 0.9},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ):
        model.generate(prompt, max_new_tokens=6, attention_mask=torch.ones_like(prompt), **options)
    assert "deprecated" not in caplog.text and "unexpected" not in caplog.text


def test_beam_search_finds_the_most_likely_text(model):
    def log_likelihood(text: torch.Tensor) -> float:
        logits = model(text, use_cache=False).logits.log_softmax(-1)
        return logits[:, 5:-1].gather(-1, text[:, 6:, None]).sum().item()

    prompt = ids(6)
    wide = model.generate(
        prompt, max_new_tokens=2, num_beams=101, do_sample=False, eos_token_id=-1, length_penalty=0.0
    )
    pairs = torch.cartesian_prod(torch.arange(101), torch.arange(101))
    logits = model(torch.cat([prompt.expand(101, -1), torch.arange(101)[:, None]], 1), use_cache=False).logits
    scores = logits[:1, 5].log_softmax(-1).T + logits[:, 6].log_softmax(-1)  # (first, second)
    best = pairs[scores.flatten().argmax()]
    assert wide[0, 6:].tolist() == best.tolist()
    assert log_likelihood(wide) == pytest.approx(scores.max().item(), abs=1e-4)


def test_continuous_batching_generates_the_greedy_text(model):
    prompts = [ids(6)[0].tolist(), ids(9)[0].tolist()]
    generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=-1, pad_token_id=0)
    # The default size of the cache is a share of the memory of the machine, and takes seconds to fill.
    cache = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    outputs = model.generate_batch(
        prompts, generation_config=generation_config, continuous_batching_config=cache
    )
    completions = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt in prompts:
        expected = greedy_continuation(model, torch.tensor([prompt]), 8)[0, len(prompt) :]
        assert completions[tuple(prompt)] == expected.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rotary_positions_extend_past_the_context(cache):
    model = tiny_model(family="llama")
    generated = model.generate(ids(40), max_new_tokens=20, cache_implementation=cache, **GREEDY)

    assert generated.tolist() == greedy_continuation(model, ids(40), 20).tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"inputs": ids(40), "max_new_tokens": 20},
            r"40 tokens.*max_new_tokens \(20\).*60 tokens.*of 48",
        ),
        ({"inputs": ids(40), "max_length": 50}, r"40 tokens.*50 tokens do not fit the context of 48"),
        ({"inputs": ids(49), "max_new_tokens": 1}, r"49 tokens.*50 tokens do not fit.*shorten the prompt"),
        ({"inputs_embeds": torch.zeros(1, 40, 32), "max_new_tokens": 9}, r"49 tokens do not fit"),
        ({"inputs": ids(40), "max_new_tokens": 9, "num_beams": 2}, r"lower max_new_tokens"),
    ],
    ids=["max_new_tokens", "max_length", "prompt", "embeddings", "beams"],
)
def test_learned_positions_reject_a_length_past_the_context(options, message, cache):
    model = tiny_model(family="gpt2")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("decoded before the check"))

    with pytest.raises(ValueError, match=message):
        model.generate(**options, cache_implementation=cache, eos_token_id=None)


def test_generate_fills_the_context_to_its_last_token():
    model = tiny_model(family="gpt2")
    expected = greedy_continuation(model, ids(40), 8).tolist()
    embeds = model.get_input_embeddings()(ids(40))

    assert model.generate(ids(40), max_new_tokens=8, **GREEDY).tolist() == expected
    assert model.generate(ids(40), max_length=48, **GREEDY).tolist() == expected
    assert model.generate(inputs_embeds=embeds, max_length=48, **GREEDY).tolist() == [expected[0][40:]]
    assistant = tiny_model(seed=1, family="gpt2")
    generated = model.generate(ids(40), assistant_model=assistant, max_new_tokens=8, **GREEDY)
    assert generated.tolist() == expected


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_takes_no_place_in_the_context(cache):
    model = tiny_model(family="gpt2")
    padded = torch.nn.functional.pad(ids(30), (25, 0))  # 55 wide, 30 tokens
    mask = (torch.arange(55) >= 25).long()[None]
    options = {"attention_mask": mask, "cache_implementation": cache, **GREEDY}

    generated = model.generate(padded, max_new_tokens=18, **options)
    assert generated[:, 25:].tolist() == greedy_continuation(model, ids(30), 18).tolist()
    with pytest.raises(ValueError, match=r"30 tokens.*max_new_tokens \(19\)"):
        model.generate(padded, max_new_tokens=19, **options)


def test_generate_stops_at_the_context_by_default(tmp_path, caplog):
    # A pipeline requests 256 new tokens by default, five times this context.
    words = {f"w{i}": i for i in range(101)}
    split = Tokenizer(models.WordLevel(words, unk_token="w0"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=split, pad_token="w0").save_pretrained(tmp_path)
    model = tiny_model(family="gpt2")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)

    generate = pipeline("text-generation", model=str(tmp_path))
    token_ids = generate("w5 w6 w7", return_tensors=True)[0]["generated_token_ids"]
    assert len(token_ids) == 48
    assert len(generate("w5 w6 w7", max_new_tokens=4, return_tensors=True)[0]["generated_token_ids"]) == 7
    assert model.generate(ids(3)).shape == (1, 48)
    assert "max_length" not in caplog.text  # no warning about a conflict with max_new_tokens
