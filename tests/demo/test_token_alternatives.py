"""Probabilities behind the words of a story, against the logits of the model."""

import pytest
import torch
from conftest import tiny_model
from test_foreign_models import SIZES, gpt2_tokenizer, llama_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tinystories_slm.demo.token_alternatives import story_words, token_probabilities

TEXT = "The fox saw Zoë's cat, once 🦊!\n\nShe ran."


def distributions(model, ids: list[int]) -> torch.Tensor:
    """The probabilities (T - 1, V) of the tokens after each prefix, one forward pass per prefix."""
    rows = [model(torch.tensor([ids[:end]])).logits[0, -1] for end in range(1, len(ids))]
    return torch.stack(rows).double().softmax(dim=-1)


def test_probabilities_are_those_of_the_logits(model_with_tokenizer, tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer("The fox was happy").input_ids]
    own, top_ids, top = token_probabilities(model_with_tokenizer, ids, 3)
    expected = distributions(model_with_tokenizer, ids)
    for row, token in enumerate(ids[1:]):
        assert own[row] == pytest.approx(expected[row, token].item(), rel=1e-4)
        values, indices = expected[row].topk(3)
        assert top_ids[row] == indices.tolist()
        assert top[row] == pytest.approx(values.tolist(), rel=1e-4)


def test_suppressed_tokens_have_no_share(model_with_tokenizer, tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer("The fox").input_ids]
    _, [best, *_], _ = token_probabilities(model_with_tokenizer, ids, 1)
    own, top_ids, top = token_probabilities(model_with_tokenizer, ids, len(tokenizer), best)
    expected = distributions(model_with_tokenizer, ids)
    expected[:, best] = 0
    expected /= expected.sum(dim=-1, keepdim=True)
    assert own[0] == pytest.approx(expected[0, ids[1]].item(), rel=1e-4)
    assert top[0][-1] == 0.0 and top_ids[0][-1] == best[0]
    assert sum(top[0]) == pytest.approx(1.0, rel=1e-5)


def test_words_hold_the_tokens_and_probabilities_of_the_story(model_with_tokenizer, tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT).input_ids, tokenizer.eos_token_id]
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=200, scale=4.0)
    words = story_words(model, tokenizer, ids, num_alternatives=2)
    assert [word.text for word in words] == [
        "The", " fox", " saw", " Zoë", "'", "s", " cat", ",", " once", " 🦊!", "\n\n", "She", " ran", ".",
        "",
    ]  # fmt: skip
    expected = distributions(model, ids)
    for word in words:
        shares = [expected[one.index - 1, ids[one.index]] for one in word.tokens]
        assert word.probability == pytest.approx(torch.stack(shares).prod().item(), rel=1e-4)
    # The start token is left out, the end token is a word without text, and every other token is in a word.
    assert [one.index for word in words for one in word.tokens] == list(range(1, len(ids)))
    [fox] = [word for word in words if "🦊" in word.text]
    assert len(fox.tokens) >= 4  # bytes of one character
    assert all(len(one.alternatives) == 2 for word in words for one in word.tokens)


def test_half_a_character_at_the_end_of_a_story_is_shown_as_such(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    ids = [tokenizer.eos_token_id, *tokenizer("fox 🦊").input_ids[:-1]]
    words = story_words(model, tokenizer, ids)
    assert words[0].text == "fox" and "".join(word.text for word in words) == "fox \ufffd"
    assert words[-1].tokens[-1].index == len(ids) - 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_words_of_other_models(kind):
    if kind == "llama":
        tokenizer, model = llama_tokenizer(), LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=1)).eval()
    else:
        tokenizer, model = (
            gpt2_tokenizer(),
            GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)).eval(),
        )
    ids = tokenizer("Once upon a time é 🦊 ran").input_ids
    words = story_words(model, tokenizer, ids)
    assert "".join(word.text for word in words) == tokenizer.decode(ids, skip_special_tokens=True)
    assert [word.text.strip() for word in words] == ["Once", "upon", "a", "time", "é", "🦊", "ran"]
    # A token is shown with its blank, although Llama's tokenizer removes the blank of a single token.
    texts = [one.token.text for word in words for one in word.tokens]
    assert "".join(texts).startswith("Once upon a time ")
    first = words[0].tokens[0]
    assert (first.token.probability is None) == (kind == "gpt2")  # nothing precedes it


def test_blank_of_a_token_is_kept_although_the_tokenizer_removes_it_from_a_text():
    tokenizer = llama_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    ids = [1, *tokenizer.convert_tokens_to_ids(["a", "▁", "t"])]
    assert tokenizer.decode(ids[2:3]) == ""
    words = story_words(model, tokenizer, ids)
    assert [one.token.text for word in words for one in word.tokens] == ["a", " ", "t"]
    assert [word.text for word in words] == ["a", " t"]
