import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper

from tinystories_slm.generation import Sampling
from tinystories_slm.generation.sampling import StoryDice

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0, -float("inf")])


def test_a_draw_follows_the_probabilities():
    num = 20_000
    [*rows] = StoryDice(range(num))(None, LOGITS.expand(num, -1)).argmax(dim=-1).bincount(minlength=6)
    expected = torch.softmax(LOGITS, dim=0) * num
    for drawn, mean in zip(rows, expected, strict=True):
        assert abs(drawn.item() - mean.item()) <= 4.5 * mean.item() ** 0.5  # binomial, 4.5 sigma
    assert rows[5] == 0


def test_each_row_has_a_stream_of_its_own_that_moves_on():
    state = torch.get_rng_state()
    both, alone = StoryDice([7, 8]), StoryDice([8])
    first, again = both(None, torch.zeros(2, 50)), both(None, torch.zeros(2, 50))
    assert torch.equal(first[1], alone(None, torch.zeros(1, 50))[0])
    assert torch.equal(again[1], alone(None, torch.zeros(1, 50))[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def kinds(**settings) -> list[str]:
    off = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    return [type(step).__name__ for step in Sampling(**off | settings).processors([0], 3)]


def test_a_knob_that_is_off_does_nothing():
    assert kinds() == ["TemperatureLogitsWarper", "StoryDice"]
    assert kinds(temperature=0.0, top_k=5, top_p=0.9, min_p=0.1) == []
    assert kinds(top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1) == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "StoryDice",
    ]  # generate()'s own order


@pytest.mark.parametrize(
    ("settings", "warper"),
    [({"top_k": 2}, TopKLogitsWarper(2)), ({"min_p": 0.1}, MinPLogitsWarper(0.1))],
)
def test_it_draws_from_what_transformers_leaves(settings, warper):
    num = 2000
    sampling = Sampling(**{"top_k": 0, "top_p": 1.0, "temperature": 1.0} | settings)
    scores = sampling.processors(range(num), 1)(torch.zeros(num, 1, dtype=int), LOGITS.repeat(num, 1))
    left = torch.isfinite(warper(torch.zeros(1, 1, dtype=int), LOGITS[None]))[0]
    assert set(scores.argmax(dim=-1).tolist()) == set(left.nonzero()[:, 0].tolist())
    assert 1 < left.sum() < 5


def test_the_repetition_penalty_counts_the_continuation_alone():
    steps = Sampling(temperature=0.0, repetition_penalty=2.0).processors([0], prompt_length=2)
    ids = torch.tensor([[0, 1, 2]])  # 0 and 1 are prompt, or padding
    assert steps(ids[:, :2], torch.ones(1, 4)).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert steps(ids, torch.ones(1, 4)).tolist() == [[1.0, 1.0, 0.5, 1.0]]
