"""What `generate()` and a pipeline do with our classes: caches, padding and the end of the context."""

import logging

import pytest
import torch
from conftest import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

# No id is -1: an end that is never generated. (transformers 5.10 cannot look a prompt up with None.)
GREEDY = {"do_sample": False, "eos_token_id": -1}


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(length))


def written_out(model, prompt: torch.Tensor, num_new_tokens: int) -> torch.Tensor:
    """The greedy continuation by its definition: the whole text anew for each token, no cache."""
    for _ in range(num_new_tokens):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_left_padded_prompts_continue_as_they_do_alone(model, implementation, cache):
    model.set_attn_implementation(implementation)
    short, long = ids(4), ids(11)
    batch = torch.cat([torch.nn.functional.pad(short, (7, 0)), long])
    mask = torch.tensor([[0] * 7 + [1] * 4, [1] * 11])
    told = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=10,
        **GREEDY,
        **({"use_cache": False} if cache == "none" else {"cache_implementation": cache}),
    )

    assert told[0, 7:].tolist() == written_out(model, short, 10)[0].tolist()
    assert told[1].tolist() == written_out(model, long, 10)[0].tolist()


def test_every_way_of_decoding_greedily_tells_the_same_text(model):
    prompt = ids(6)
    expected = written_out(model, prompt, 12).tolist()
    embeds = model.get_input_embeddings()(prompt)

    assert model.generate(prompt, max_new_tokens=12, **GREEDY).tolist() == expected
    told = model.generate(inputs_embeds=embeds, max_new_tokens=12, **GREEDY)
    assert told.tolist() == [expected[0][6:]]
    assistant = tiny_model(seed=1, family=model.config.family)
    told = model.generate(prompt, assistant_model=assistant, max_new_tokens=12, **GREEDY)
    assert told.tolist() == expected
    told = model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=12, **GREEDY)
    assert told.tolist() == expected


@pytest.mark.filterwarnings("error::FutureWarning")
def test_generate_is_used_without_a_deprecated_name(model, caplog):
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


def test_beams_find_at_least_the_greedy_text(model):
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


def test_continuous_batching_generates_the_same_text(model):
    prompts = [ids(6)[0].tolist(), ids(9)[0].tolist()]
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(prompts, generation_config=settings)
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt in prompts:
        expected = written_out(model, torch.tensor([prompt]), 8)[0, len(prompt) :]
        assert generated[tuple(prompt)] == expected.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rotary_positions_go_past_the_context(cache):
    model = tiny_model(family="modern")
    told = model.generate(ids(40), max_new_tokens=20, cache_implementation=cache, **GREEDY)

    assert told.tolist() == written_out(model, ids(40), 20).tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("asked", "message"),
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
def test_learned_positions_refuse_a_length_past_the_context_before_decoding(asked, message, cache):
    model = tiny_model(family="gpt")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("decoded before refusing"))

    with pytest.raises(ValueError, match=message):
        model.generate(**asked, cache_implementation=cache, eos_token_id=None)


def test_the_context_can_be_filled_to_its_last_token():
    model = tiny_model(family="gpt")
    expected = written_out(model, ids(40), 8).tolist()
    embeds = model.get_input_embeddings()(ids(40))

    assert model.generate(ids(40), max_new_tokens=8, **GREEDY).tolist() == expected
    assert model.generate(ids(40), max_length=48, **GREEDY).tolist() == expected
    assert model.generate(inputs_embeds=embeds, max_length=48, **GREEDY).tolist() == [expected[0][40:]]
    assistant = tiny_model(seed=1, family="gpt")
    told = model.generate(ids(40), assistant_model=assistant, max_new_tokens=8, **GREEDY)
    assert told.tolist() == expected


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_takes_no_place_in_the_context(cache):
    model = tiny_model(family="gpt")
    padded = torch.nn.functional.pad(ids(30), (25, 0))  # 55 wide, 30 tokens
    mask = (torch.arange(55) >= 25).long()[None]
    settings = {"attention_mask": mask, "cache_implementation": cache, **GREEDY}

    told = model.generate(padded, max_new_tokens=18, **settings)
    assert told[:, 25:].tolist() == written_out(model, ids(30), 18).tolist()
    with pytest.raises(ValueError, match=r"30 tokens.*max_new_tokens \(19\)"):
        model.generate(padded, max_new_tokens=19, **settings)


def test_where_nobody_says_how_long_a_text_ends_at_the_context(tmp_path, caplog):
    # A pipeline asks for 256 new tokens on its own, five times this context.
    words = {f"w{i}": i for i in range(101)}
    split = Tokenizer(models.WordLevel(words, unk_token="w0"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=split, pad_token="w0").save_pretrained(tmp_path)
    model = tiny_model(family="gpt")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)

    tell = pipeline("text-generation", model=str(tmp_path))
    told = tell("w5 w6 w7", return_tensors=True)[0]["generated_token_ids"]
    assert len(told) == 48
    assert len(tell("w5 w6 w7", max_new_tokens=4, return_tensors=True)[0]["generated_token_ids"]) == 7
    assert model.generate(ids(3)).shape == (1, 48)
    assert "max_length" not in caplog.text  # no warning of a clash that nobody made
