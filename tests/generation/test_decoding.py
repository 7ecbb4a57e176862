"""Our own decoding loop beside transformers': the same text, whatever is told beside it."""

from functools import partial

import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from tinystories_slm.generation import Sampling, StoryStream, begin, generate_stories, kernels, tell_stories
from tinystories_slm.generation.decoding import Decoder, choose_decoding, decode

GREEDY = Sampling(temperature=0.0)
COMPILED = kernels.load_kernels(torch.float32) is not None
WAYS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not COMPILED, reason="no C compiler"))]


def prompts(lengths: list[int]) -> list[list[int]]:
    return [
        torch.randint(1, 101, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in lengths
    ]


def told(model, texts: list[list[int]], budgets: list[int], **settings) -> list[list[int]]:
    """New tokens of each story from our loop, called through `generate()`."""
    longest = max(map(len, texts))
    input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in texts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in texts])
    settings = {"seeds": range(len(texts)), "sampling": GREEDY, "end_ids": [-1]} | settings
    loop = partial(decode, budgets=budgets, **settings)
    with torch.no_grad():
        ended = dict(model.generate(input_ids, attention_mask=mask, max_new_tokens=1, custom_generate=loop))
    return [ended[number] for number in range(len(texts))]


def plain(model, ids: list[int], budget: int) -> list[int]:
    told = model.generate(
        torch.tensor([ids]), do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=budget
    )
    return told[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("way", WAYS)
def test_greedy_text_is_that_of_transformers_loop(model, way, batch_size):
    texts = prompts([1, 12, 5, 12, 30, 7, 5, 3])
    budgets = [20, 36, 1, 9, 18, 40, 13, 2]  # two fill the context of 48 to its last token
    expected = [plain(model, ids, budget) for ids, budget in zip(texts, budgets, strict=True)]

    assert told(model, texts, budgets, batch_size=batch_size, way=way) == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_story_ends_at_any_of_its_end_tokens_and_leaves_its_place(model, way, monkeypatch):
    texts, budgets = prompts([4, 9, 4, 6, 2]), [30] * 5
    whole = told(model, texts, budgets, batch_size=5, way=way)
    ends = {whole[0][3], whole[1][7], whole[4][2]}
    sizes = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids, at: sizes.append(len(ids)) or step(self, ids, at))

    cut = told(model, texts, budgets, batch_size=2, way=way, end_ids=ends)
    for ids, short in zip(whole, cut, strict=True):
        at = next((at for at, token in enumerate(ids) if token in ends), len(ids) - 1)
        assert short == ids[: at + 1]
    assert sum(sizes) == sum(map(len, cut)) - 5  # nothing is computed for a story that has ended
    assert set(sizes) <= {1, 2}


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_a_seed_tells_the_same_by_every_loop_alone_beside_others_and_streamed(
    model_with_tokenizer, tokenizer, way
):
    sampling = Sampling(max_new_tokens=40, top_k=30, min_p=0.001, repetition_penalty=1.3)
    texts = ["Once upon a time", "The fox", "", "The fox", "Once upon a time there was a fox. The fox", "A"]
    beginnings = begin(model_with_tokenizer, tokenizer, texts, [3, 4, 5, 6, 3, 3], sampling)
    expected = list(
        tell_stories(model_with_tokenizer, tokenizer, beginnings, sampling, batch_size=1, decoding="plain")
    )
    assert len({story.text for story in expected}) == 6

    for batch_size in (1, 2, 6):
        stories = tell_stories(
            model_with_tokenizer, tokenizer, beginnings, sampling, batch_size=batch_size, decoding=way
        )
        assert list(stories) == expected
    for beginning, story in zip(beginnings, expected, strict=True):
        stream = StoryStream(model_with_tokenizer, tokenizer, beginning, sampling, decoding=way)
        assert ("".join(stream), stream.story) == (story.text, story)


def replayed(model, ids: list[int], way: str) -> torch.Tensor:
    """Logits (T - 1, V) after the first, second, ... of the given tokens."""
    with torch.inference_mode():
        decoder = Decoder(model, 2, len(ids), way)
        decoder.start(ids[:1], [0, 1])
        alone = [decoder.step([ids[at]], [at])[0].clone() for at in range(1, len(ids))]
        beside = [decoder.step([ids[at]] * 2, [at] * 2)[1] for at in range(1, len(ids))]
    return torch.stack([torch.stack(alone), torch.stack(beside)])  # (2, T - 1, V)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_logits_are_the_models(family, way):
    [ids] = prompts([40])
    exact = tiny_model(**family)
    with torch.no_grad():
        expected = exact(torch.tensor([ids])).logits[0, 1:]
        rounded = tiny_model(**family).bfloat16()
        theirs = (rounded(torch.tensor([ids])).logits[0, 1:].float() - expected).square().mean().sqrt()

    assert (replayed(exact, ids, way) - expected).abs().max() < 2e-5  # logits reach 3.4
    # bfloat16: no further from float32 than transformers' own loop, which rounds more on its way.
    ours = (replayed(rounded, ids, way) - expected).square().mean(dim=(1, 2)).sqrt()
    assert theirs < 0.02 and bool((ours < 1.1 * theirs).all()), (ours, theirs)


@pytest.mark.skipif(not COMPILED, reason="no C compiler")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4], ids="{} threads".format)  # with 3 some share a head
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_any_number_of_threads_computes_the_same(family, num_threads):
    [ids] = prompts([12])
    model, threads = tiny_model(**family), torch.get_num_threads()
    expected = replayed(model, ids, "native")
    try:
        torch.set_num_threads(num_threads)
        assert (replayed(model, ids, "native") - expected).abs().max() < 1e-5
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not COMPILED, reason="no C compiler")
def test_a_long_text_is_attended_to_block_by_block():
    model = tiny_model(family="modern", max_position_embeddings=700)
    [ids] = prompts([600])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, 1:]
    assert (replayed(model, ids, "native") - expected).abs().max() < 5e-5


def test_dropout_stays_off_and_the_model_as_it_was():
    model = tiny_model(dropout=0.5)
    expected = plain(model, [5, 6], 20)
    model.train()
    assert told(model, [[5, 6]], [20], batch_size=1, way="torch") == [expected]
    assert model.training


def test_only_what_we_know_is_decoded_by_us(monkeypatch):
    best = "native" if COMPILED else "torch"
    assert choose_decoding(tiny_model())[0] == best
    assert choose_decoding(tiny_model(), "torch") == ("torch", "as asked")
    assert choose_decoding(tiny_model(), "plain") == ("plain", "as asked")
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    assert choose_decoding(theirs, "native") == ("plain", "GPT2LMHeadModel is another's class")
    hooked = tiny_model()
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert choose_decoding(hooked) == ("plain", "a hook looks at model.layers.0.mlp")
    adapted = tiny_model()
    adapted.model.layers[1].self_attn.q_proj = type("Adapter", (torch.nn.Linear,), {})(32, 32)
    assert choose_decoding(adapted) == ("plain", "model.layers.1.self_attn.q_proj is no plain linear layer")
    assert choose_decoding(tiny_model().half())[0] == "plain"
    assert choose_decoding(tiny_model(hidden_act="gelu"))[0] == "torch"


@pytest.mark.parametrize("compiler", ["absent", "false"])
def test_without_a_compiler_that_works_torch_decodes(
    model_with_tokenizer, tokenizer, compiler, monkeypatch, tmp_path, caplog
):
    expected = generate_stories(model_with_tokenizer, tokenizer, ["Once"], seed=0)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load_kernels.cache_clear()
    try:
        assert choose_decoding(model_with_tokenizer) == ("torch", "no C compiler that does it")
        assert generate_stories(model_with_tokenizer, tokenizer, ["Once"], seed=0) == expected
    finally:
        kernels.load_kernels.cache_clear()
    assert "left to torch" in caplog.text and caplog.text.count("\n") == 1


@pytest.mark.skipif(not COMPILED, reason="no C compiler")
def test_the_kernels_are_compiled_once_and_leave_the_process_its_rounding(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load_kernels.cache_clear()
    try:
        assert kernels.load_kernels(torch.float32) is not None
        [library] = (tmp_path / "tinystories_slm").iterdir()
        made = library.stat().st_mtime_ns
        kernels.load_kernels.cache_clear()
        assert kernels.load_kernels(torch.float32) is not None
        assert library.stat().st_mtime_ns == made
    finally:
        kernels.load_kernels.cache_clear()
    assert (torch.tensor([1e-40]) * 0.5).item() > 0.0  # subnormal, which -ffast-math when linked makes 0
