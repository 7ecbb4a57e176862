"""Scores of one model: the same however they are computed, from its own start, and errors for bad input."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tinystories_slm.data.tokenizer import encode_stories, train_bpe
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import score_texts
from tinystories_slm.evaluation.parameters import count_parameters
from tinystories_slm.evaluation.scoring import score_model
from tinystories_slm.model_costs import num_embedding_parameters, num_parameters
from tinystories_slm.model_folder import load_model_folder, save_model_folder

TEXTS = ["Once upon a time there was a fox.", "The fox was happy.", "Zoë saw 🦊🦊.", "A", "The end. " * 20]
VOCAB_SIZE = 280


@pytest.fixture(scope="module")
def story_model():
    return tiny_model(vocab_size=VOCAB_SIZE, scale=4.0)


def gpt2(end_bias: float = 0.0) -> GPT2LMHeadModel:
    """A GPT-2 with weights of its own; a negative `end_bias` makes its end token 0 improbable."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, tie_word_embeddings=False, **sizes)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[0] = end_bias / 32
    return model


def gpt2_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = train_bpe(["Once upon a time there was a fox. The fox was happy."] * 3, VOCAB_SIZE)
    special = special or {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@settings(max_examples=15)
@given(
    texts=st.lists(st.text("aefnoxé 🦊.", max_size=40), min_size=1, max_size=5).filter(any),
    batch_size=st.integers(1, 9),
    padding_side=st.sampled_from(["left", "right"]),
)
def test_scores_do_not_depend_on_batch_size_or_padding(
    story_model, tokenizer, texts, batch_size, padding_side
):
    for model in (story_model, gpt2(), gpt2(end_bias=-15.0)):
        expected = score_model(model, tokenizer, texts, batch_size=1)
        tokenizer.padding_side = padding_side
        tokenizer(texts, padding=True, truncation=True, max_length=5)  # leaves its settings in the backend
        found = score_model(model, tokenizer, texts, batch_size=batch_size)
        np.testing.assert_allclose(found.scores.token_nats, expected.scores.token_nats, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.scores.nats, expected.scores.nats, rtol=1e-5)  # measured: 6e-8
        assert (found.scores.num_tokens == expected.scores.num_tokens).all()
        assert (found.start, found.end) == (expected.start, expected.end)


def test_bfloat16_scores_differ_by_less_than_the_stated_bound(tokenizer):
    for family in ("gpt2", "llama"):
        model = tiny_model(vocab_size=VOCAB_SIZE, scale=2.0, family=family)
        expected = score_model(model, tokenizer, TEXTS, batch_size=2)
        model = model.to(torch.bfloat16)
        for batch_size in (1, 5):
            found = score_model(model, tokenizer, TEXTS, batch_size=batch_size)
            np.testing.assert_allclose(found.scores.nats, expected.scores.nats, rtol=1e-2)
            assert found.metrics()["loss"] == pytest.approx(expected.metrics()["loss"], rel=1e-3)


def test_sums_of_tokens_are_the_sums_of_stories(story_model, tokenizer):
    found = score_model(story_model, tokenizer, TEXTS, batch_size=2)
    by_story = np.bincount(found.scores.token_story, found.scores.token_nats)
    np.testing.assert_allclose(by_story, found.scores.nats, rtol=1e-12)
    assert (found.text_nats < found.scores.nats).all()
    assert (found.num_text_tokens == [len(ids) for ids in encode_stories(tokenizer, TEXTS)]).all()
    buckets = found.buckets(tokenizer, TEXTS)
    for rows in buckets.values():
        assert sum(row["num_bytes"] for row in rows) == found.num_bytes.sum()
        assert sum(row["loss"] * row["num_tokens"] for row in rows) == pytest.approx(found.text_nats.sum())
    metrics, intervals = found.metrics(), found.intervals()
    for name, (low, high) in intervals.items():
        assert low <= metrics[name] <= high and (low < high or not metrics[name]), name


def test_end_token_that_training_did_not_use_is_not_scored():
    known, unknown = gpt2(), gpt2(end_bias=-15.0)
    tokenizer = gpt2_tokenizer()
    [ids] = encode_stories(tokenizer, TEXTS[:1])
    scores = score_model(known, tokenizer, TEXTS[:1], batch_size=1)
    assert (scores.start, scores.end) == ("<|endoftext|>", "<|endoftext|>")
    assert scores.scores.num_tokens.tolist() == [len(ids) + 1]

    scores = score_model(unknown, tokenizer, TEXTS[:1], batch_size=1)
    assert (scores.start, scores.end) == (None, None) and "below a tenth" in scores.metrics()["end_reason"]
    log_probs = unknown(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = math.log(VOCAB_SIZE) - log_probs[range(len(ids) - 1), ids[1:]].sum().item()
    assert scores.scores.nats[0] == pytest.approx(expected, rel=1e-5)  # the first token: a uniform guess
    assert scores.scores.num_tokens.tolist() == [len(ids)]
    metrics = scores.metrics()
    assert metrics["bits_per_byte"] == pytest.approx(metrics["text_bits_per_byte"])

    unknown.config.training_data = [{"source": "builtin"}]  # an export of a model that was trained here
    assert score_model(unknown, tokenizer, TEXTS[:1], batch_size=1).metrics()["end_reason"] == "trained here"
    del unknown.config.training_data
    scored = score_model(unknown, tokenizer, TEXTS[:1], batch_size=1, end_token="scored")
    assert scored.end == "<|endoftext|>" and scored.scores.nats[0] > scores.scores.nats[0] + 10
    assert score_model(known, tokenizer, TEXTS[:1], batch_size=1, end_token="unscored").end is None


def test_start_token_stays_if_only_the_end_is_unknown():
    tokenizer = gpt2_tokenizer(bos_token="f", eos_token="<|endoftext|>")
    scores = score_model(gpt2(end_bias=-15.0), tokenizer, TEXTS, batch_size=2)
    assert (scores.start, scores.end) == ("f", None)


def test_model_without_special_tokens_is_scored_and_loads(tmp_path):
    tokenizer = gpt2_tokenizer(unk_token="a")
    scores = score_model(gpt2(), tokenizer, TEXTS, batch_size=2)
    assert (scores.start, scores.end) == (None, None)
    assert scores.metrics()["end_reason"] == "the tokenizer has no end token that the model knows"
    gpt2().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model_folder(str(tmp_path), requires_eos=False)
    assert score_texts(model, tokenizer, ["A"], batch_size=1)["loss"] == pytest.approx(math.log(VOCAB_SIZE))
    with pytest.raises(UserError, match="has no eos token"):
        load_model_folder(str(tmp_path))


def test_nan_weights_are_an_error_that_names_them(tokenizer):
    model = tiny_model(vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    message = (
        r"^model \(.*\): the log-probabilities of 5 of 5 stories are not finite, because 1 of its weights "
    )
    with pytest.raises(UserError, match=message + r"are not finite, such as model\.layers\.1\.mlp.*; use an"):
        score_texts(model, tokenizer, TEXTS, batch_size=2)
    model = tiny_model(vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e38)
    with pytest.raises(UserError, match=r"its computation overflows in float32; use --dtype float32"):
        score_texts(model, tokenizer, TEXTS, batch_size=2)


def test_vocabulary_larger_than_the_embedding_is_an_error(tokenizer):
    with pytest.raises(
        UserError, match=r"token ids up to 2\d\d, but the embedding has 100 rows; use the tok"
    ):
        score_texts(tiny_model(vocab_size=100), tokenizer, TEXTS, batch_size=2)
    # An end token that was added after training has no row: the model did not see it.
    tokenizer = gpt2_tokenizer(eos_token="</s>")
    assert tokenizer.eos_token_id == VOCAB_SIZE
    assert score_model(gpt2(), tokenizer, TEXTS, batch_size=2).end is None


def test_empty_and_one_word_stories_have_a_score(story_model, tokenizer):
    scores = score_model(story_model, tokenizer, ["", "fox"], batch_size=2)
    assert scores.scores.num_tokens[0] == 1 and scores.scores.nats[0] > 0  # the end token alone
    assert math.isfinite(scores.metrics()["bits_per_byte"])
    scores = score_model(gpt2(), gpt2_tokenizer(unk_token="a"), ["", "a"], batch_size=2)
    assert scores.scores.nats.tolist() == [0.0, pytest.approx(math.log(VOCAB_SIZE))]
    one = score_model(story_model, tokenizer, ["fox"], batch_size=2)
    assert set(one.intervals().values()) == {None}
    with pytest.raises(UserError, match=r"data \(2 stories\): must contain text"):
        score_texts(story_model, tokenizer, ["", ""], batch_size=2)


def test_lossy_tokenizer_has_a_share_and_no_bits_per_byte(story_model):
    tokenizer = gpt2_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    scores = score_model(story_model, tokenizer, ["The Fox", "ran home"], batch_size=2)
    metrics = scores.metrics()
    assert "bits_per_byte" not in metrics and "text_bits_per_byte" not in metrics
    assert (metrics["lost_bytes"], metrics["lost_share"]) == (2, 2 / 15)
    assert set(scores.intervals()) == {"loss", "perplexity", "accuracy"}


def test_parameters_are_counted_with_and_without_embeddings(model):
    config = model.config
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    expected = num_parameters(config)
    assert count_parameters(model) == (expected, expected - num_embedding_parameters(config) - head)


def test_folder_without_a_tokenizer_is_an_error(tmp_path, tokenizer):
    folder = save_model_folder(tiny_model(vocab_size=VOCAB_SIZE), tokenizer, tmp_path / "best")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"^tokenizer \(.*best\).*; use ") as error:
        load_model_folder(str(folder), requires_eos=False)
    assert "\n" not in str(error.value)
