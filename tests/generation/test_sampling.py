import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinystories_slm.generation import Sampling
from tinystories_slm.generation.sampling import StoryDice, story_die

OFF = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0, -float("inf")])


def drawn(sampling: Sampling, logits: torch.Tensor, num: int) -> torch.Tensor:
    """How often each token is drawn from the same logits (V,) by `num` stories."""
    scores = StoryDice(sampling, range(num))(None, logits.repeat(num, 1))
    assert (scores == 0.0).sum() == num and torch.isneginf(scores).sum() == scores.numel() - num
    return scores.argmax(dim=-1).bincount(minlength=len(logits))


def assert_drawn_from(probabilities: torch.Tensor, counts: torch.Tensor) -> None:
    for count, mean in zip(counts, probabilities * counts.sum(), strict=True):
        assert abs(count.item() - mean.item()) <= 4.5 * mean.item() ** 0.5  # binomial, 4.5 sigma


def test_a_draw_follows_the_probabilities():
    assert_drawn_from(torch.softmax(LOGITS, dim=0), drawn(Sampling(**OFF), LOGITS, 20_000))


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"top_k": 30}, [TopKLogitsWarper(30)]),
        ({"top_k": 5000}, []),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),  # more tokens than are looked at first
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [
                TemperatureLogitsWarper(0.7),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)  # fmt: skip
def test_it_draws_from_what_transformers_warpers_leave(settings, warpers):
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    probabilities = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=int), logits[None]).softmax(-1)[0]
    counts = drawn(Sampling(**OFF | settings), logits, 4000)
    assert counts[probabilities == 0].sum() == 0
    likely = probabilities > 0.005  # the others together, as each is too rare for a count of its own
    together = [torch.cat([x[likely], x[~likely].sum()[None]]) for x in (probabilities, counts)]
    assert_drawn_from(*together)


def test_each_row_has_a_stream_of_its_own_that_moves_on():
    state, sampling = torch.get_rng_state(), Sampling(**OFF)
    both, alone = StoryDice(sampling, [7, 8]), StoryDice(sampling, [8])
    first, again = both(None, torch.zeros(2, 50)), both(None, torch.zeros(2, 50))
    assert torch.equal(first[1], alone(None, torch.zeros(1, 50))[0])
    assert torch.equal(again[1], alone(None, torch.zeros(1, 50))[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_largest_number_a_die_can_show_still_names_a_token():
    class Six:
        def random(self) -> float:
            return 1.0 - 2.0**-53

    logits = torch.full((1, 3000), -20.0)
    logits[0, :3] = torch.tensor([0.3, 0.2, 0.1])
    logits[0, 3:] = -float("inf")
    assert Sampling(**OFF).choose(logits, [Six()]).tolist() == [2]


def test_a_tie_at_the_edge_moves_no_other_token():
    logits = torch.tensor([[1.0, 3.0, 1.0 + 1e-6, 2.0], [1.0 + 1e-6, 3.0, 1.0, 2.0]])
    tokens = [
        Sampling(**OFF | {"top_k": 4, "top_p": 0.999}).choose(logits, [story_die(seed), story_die(seed)])
        for seed in range(200)
    ]
    assert all(first == second for first, second in tokens)


def test_a_model_that_diverged_tells_something():
    scores = StoryDice(Sampling(), [0])(None, torch.full((1, 60), float("nan")))
    assert (scores == 0.0).sum() == 1


def kinds(**settings) -> list[str]:
    return [type(step).__name__ for step in Sampling(**OFF | settings).processors([0], 3)]


def test_a_knob_that_is_off_does_nothing():
    assert kinds() == ["StoryDice"]
    assert kinds(temperature=0.0, top_k=5, top_p=0.9, min_p=0.1) == []
    assert kinds(repetition_penalty=1.1) == ["RepetitionPenaltyLogitsProcessor", "StoryDice"]


def test_the_repetition_penalty_counts_the_continuation_alone():
    steps = Sampling(temperature=0.0, repetition_penalty=2.0).processors([0], prompt_length=2)
    ids = torch.tensor([[0, 1, 2]])  # 0 and 1 are prompt, or padding
    assert steps(ids[:, :2], torch.ones(1, 4)).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert steps(ids, torch.ones(1, 4)).tolist() == [[1.0, 1.0, 0.5, 1.0]]
