import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.evaluation.likelihood import metrics_from_sums, score_stories
from tinystories_slm.evaluation.metric import StoryLikelihood

EOS = 0
CONTEXT = 48
stories = st.lists(st.lists(st.integers(1, 100), min_size=0, max_size=120), min_size=1, max_size=6)


def reference_nats(model, ids: list[int]) -> float:
    """Return the nats of `EOS + ids + EOS`, one token at a time, each with the context of the protocol."""
    tokens = [EOS, *ids, EOS]
    nats = 0.0
    for position in range(1, len(tokens)):
        # The first window ends at token CONTEXT; each later one starts half a context later.
        excess = max(0, position - CONTEXT)
        start = -(-excess // (CONTEXT // 2)) * (CONTEXT // 2)
        logits = model(torch.tensor([tokens[start:position]])).logits[0, -1]
        nats -= torch.log_softmax(logits, dim=-1)[tokens[position]].item()
    return nats


@pytest.mark.parametrize("length", [0, 1, 2, CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 71, 72, 73, 150])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_score_stories_scores_each_token_once_with_half_a_context(length, family):
    model = tiny_model(family=family)
    ids = np.random.default_rng(length).integers(1, 101, length).tolist()
    scores = score_stories(model, [ids], eos_token_id=EOS, batch_size=3)

    assert scores.num_tokens.tolist() == [length + 1]
    assert scores.nats[0] == pytest.approx(reference_nats(model, ids), rel=1e-5)


@given(stories=stories, batch_size=st.integers(1, 9))
def test_scores_do_not_depend_on_batch_size_or_order(stories, batch_size):
    model = tiny_model()
    one = score_stories(model, stories, eos_token_id=EOS, batch_size=1)
    many = score_stories(model, stories[::-1], eos_token_id=EOS, batch_size=batch_size)

    np.testing.assert_allclose(many.nats[::-1], one.nats, rtol=1e-6)
    assert many.num_tokens[::-1].tolist() == one.num_tokens.tolist() == [len(s) + 1 for s in stories]
    assert many.num_correct[::-1].tolist() == one.num_correct.tolist()


def test_loss_of_a_uniform_model_is_log_v():
    model = tiny_model(scale=0.0, family="llama")
    scores = score_stories(model, [[5, 6, 7], [8]], eos_token_id=EOS, batch_size=2)

    np.testing.assert_allclose(scores.nats, [4 * math.log(101), 2 * math.log(101)], rtol=1e-6)


def test_score_stories_draws_its_bar_on_a_terminal_only(capsys):
    score_stories(tiny_model(), [[1, 2, 3]], eos_token_id=EOS, batch_size=1, progress=True)
    assert capsys.readouterr().err == ""  # a log file would fill with carriage returns


def test_score_stories_restores_the_training_mode():
    model = tiny_model(dropout=0.5).train()
    first = score_stories(model, [[1, 2, 3]], eos_token_id=EOS, batch_size=1)
    again = score_stories(model, [[1, 2, 3]], eos_token_id=EOS, batch_size=1)

    assert model.training
    assert first.nats[0] == again.nats[0]  # no dropout while scoring


def test_metric_divides_sums_once():
    metric = StoryLikelihood(keep_in_memory=True)
    metric.add_batch(nats=[10.0], num_correct=[1], num_tokens=[4], num_bytes=[8])
    metric.add_batch(nats=[2.0, 0.0], num_correct=[5, 0], num_tokens=[6, 2], num_bytes=[20, 2])
    metrics = metric.compute()

    assert metrics["loss"] == pytest.approx(12 / 12)  # the mean of the means per story would be 0.944
    assert metrics["perplexity"] == pytest.approx(math.e)
    assert metrics["bits_per_byte"] == pytest.approx(12 / math.log(2) / 30)
    assert metrics["accuracy"] == pytest.approx(6 / 12)
    assert (metrics["num_tokens"], metrics["num_bytes"], metrics["num_stories"]) == (12, 30, 3)


def test_perplexity_of_a_huge_loss_is_finite():
    metrics = metrics_from_sums(nats=1e6, num_correct=0, num_tokens=10, num_bytes=10, num_stories=1)
    assert math.isfinite(metrics["perplexity"])
