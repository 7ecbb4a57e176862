import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.evaluation.likelihood import score_stories, summarize
from tinystories_slm.evaluation.metric import StoryLikelihood

EOS = 0
CONTEXT = 48
stories = st.lists(st.lists(st.integers(1, 100), min_size=0, max_size=120), min_size=1, max_size=6)


def by_hand(model, ids: list[int]) -> float:
    """Nats of `EOS + ids + EOS`, one token at a time, each seeing what the protocol lets it see."""
    tokens = [EOS, *ids, EOS]
    nats = 0.0
    for position in range(1, len(tokens)):
        # The first window reaches to token CONTEXT; each later one starts half a context further on.
        late = max(0, position - CONTEXT)
        start = -(-late // (CONTEXT // 2)) * (CONTEXT // 2)
        logits = model(torch.tensor([tokens[start:position]])).logits[0, -1]
        nats -= torch.log_softmax(logits, dim=-1)[tokens[position]].item()
    return nats


@pytest.mark.parametrize("length", [0, 1, 2, CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 71, 72, 73, 150])
@pytest.mark.parametrize("family", ["gpt", "modern"])
def test_every_token_after_the_first_is_scored_once_with_at_least_half_a_context(length, family):
    model = tiny_model(family=family)
    ids = np.random.default_rng(length).integers(1, 101, length).tolist()
    scores = score_stories(model, [ids], eos_token_id=EOS, batch_size=3)

    assert scores.num_tokens.tolist() == [length + 1]
    assert scores.nats[0] == pytest.approx(by_hand(model, ids), rel=1e-5)


@given(stories=stories, batch_size=st.integers(1, 9))
def test_neither_batch_size_nor_order_changes_the_figures(stories, batch_size):
    model = tiny_model()
    one = score_stories(model, stories, eos_token_id=EOS, batch_size=1)
    many = score_stories(model, stories[::-1], eos_token_id=EOS, batch_size=batch_size)

    np.testing.assert_allclose(many.nats[::-1], one.nats, rtol=1e-6)
    assert many.num_tokens[::-1].tolist() == one.num_tokens.tolist() == [len(s) + 1 for s in stories]
    assert many.num_correct[::-1].tolist() == one.num_correct.tolist()


def test_a_uniform_model_loses_exactly_log_v():
    model = tiny_model(scale=0.0, family="modern")
    scores = score_stories(model, [[5, 6, 7], [8]], eos_token_id=EOS, batch_size=2)

    np.testing.assert_allclose(scores.nats, [4 * math.log(101), 2 * math.log(101)], rtol=1e-6)


def test_the_model_is_left_as_it_was():
    model = tiny_model(dropout=0.5).train()
    first = score_stories(model, [[1, 2, 3]], eos_token_id=EOS, batch_size=1)
    again = score_stories(model, [[1, 2, 3]], eos_token_id=EOS, batch_size=1)

    assert model.training
    assert first.nats[0] == again.nats[0]  # no dropout while scoring


def test_the_metric_divides_sums_once():
    metric = StoryLikelihood(keep_in_memory=True)
    metric.add_batch(nats=[10.0], num_correct=[1], num_tokens=[4], num_bytes=[8])
    metric.add_batch(nats=[2.0, 0.0], num_correct=[5, 0], num_tokens=[6, 2], num_bytes=[20, 2])
    report = metric.compute()

    assert report["loss"] == pytest.approx(12 / 12)  # the mean of the stories' means would be 0.944
    assert report["perplexity"] == pytest.approx(math.e)
    assert report["bits_per_byte"] == pytest.approx(12 / math.log(2) / 30)
    assert report["accuracy"] == pytest.approx(6 / 12)
    assert (report["num_tokens"], report["num_bytes"], report["num_stories"]) == (12, 30, 3)


def test_a_hopeless_loss_does_not_overflow():
    figures = summarize(nats=1e6, num_correct=0, num_tokens=10, num_bytes=10, num_stories=1)
    assert math.isfinite(figures["perplexity"])
