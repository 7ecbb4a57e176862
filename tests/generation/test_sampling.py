import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinystories_slm.generation import SamplingParams
from tinystories_slm.generation.sampling import PerRequestSampler, logits_processors, request_rng, sample

OFF = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0, -float("inf")])


def sample_counts(sampling: SamplingParams, logits: torch.Tensor, num: int) -> torch.Tensor:
    """Counts (V,) of the tokens that `num` requests sample from the same logits (V,)."""
    scores = PerRequestSampler(sampling, range(num))(None, logits.repeat(num, 1))
    assert (scores == 0.0).sum() == num and torch.isneginf(scores).sum() == scores.numel() - num
    return scores.argmax(dim=-1).bincount(minlength=len(logits))


def assert_sampled_from(probabilities: torch.Tensor, counts: torch.Tensor) -> None:
    for count, mean in zip(counts, probabilities * counts.sum(), strict=True):
        assert abs(count.item() - mean.item()) <= 4.5 * mean.item() ** 0.5  # binomial, 4.5 sigma


def test_sampler_follows_the_probabilities():
    assert_sampled_from(torch.softmax(LOGITS, dim=0), sample_counts(SamplingParams(**OFF), LOGITS, 20_000))


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"top_k": 30}, [TopKLogitsWarper(30)]),
        ({"top_k": 5000}, []),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),  # more than the 512 candidates
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
def test_sampler_matches_the_warpers_of_transformers(options, warpers):
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    probabilities = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=int), logits[None]).softmax(-1)[0]
    counts = sample_counts(SamplingParams(**OFF | options), logits, 4000)
    assert counts[probabilities == 0].sum() == 0
    frequent = probabilities > 0.005  # the other tokens are too rare for single counts: compare their sum
    grouped = [torch.cat([x[frequent], x[~frequent].sum()[None]]) for x in (probabilities, counts)]
    assert_sampled_from(*grouped)


def test_sampler_has_an_independent_generator_per_row():
    state, sampling = torch.get_rng_state(), SamplingParams(**OFF)
    two_rows, one_row = PerRequestSampler(sampling, [7, 8]), PerRequestSampler(sampling, [8])
    first, second = two_rows(None, torch.zeros(2, 50)), two_rows(None, torch.zeros(2, 50))
    assert torch.equal(first[1], one_row(None, torch.zeros(1, 50))[0])
    assert torch.equal(second[1], one_row(None, torch.zeros(1, 50))[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_largest_random_number_selects_the_last_possible_token():
    class LargestNumber:
        def random(self) -> float:
            return 1.0 - 2.0**-53

    logits = torch.full((1, 3000), -20.0)
    logits[0, :3] = torch.tensor([0.3, 0.2, 0.1])
    logits[0, 3:] = -float("inf")
    assert sample(SamplingParams(**OFF), logits, [LargestNumber()]).tolist() == [2]


def test_order_of_tied_tokens_does_not_change_other_samples():
    logits = torch.tensor([[1.0, 3.0, 1.0 + 1e-6, 2.0], [1.0 + 1e-6, 3.0, 1.0, 2.0]])
    tokens = [
        sample(
            SamplingParams(**OFF | {"top_k": 4, "top_p": 0.999}),
            logits,
            [request_rng(seed), request_rng(seed)],
        )
        for seed in range(200)
    ]
    assert all(first == second for first, second in tokens)


def test_sampler_returns_a_token_for_nan_logits():
    scores = PerRequestSampler(SamplingParams(), [0])(None, torch.full((1, 60), float("nan")))
    assert (scores == 0.0).sum() == 1


def processor_names(**options) -> list[str]:
    processors = logits_processors(SamplingParams(**OFF | options), [0], prompt_length=3)
    return [type(processor).__name__ for processor in processors]


def test_parameters_that_are_off_add_no_processor():
    assert processor_names() == ["PerRequestSampler"]
    assert processor_names(temperature=0.0, top_k=5, top_p=0.9, min_p=0.1) == []
    assert processor_names(repetition_penalty=1.1) == [
        "RepetitionPenaltyLogitsProcessor",
        "PerRequestSampler",
    ]


def test_repetition_penalty_ignores_the_prompt():
    sampling = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    processors = logits_processors(sampling, [0], prompt_length=2)
    ids = torch.tensor([[0, 1, 2]])  # 0 and 1 are prompt or padding
    assert processors(ids[:, :2], torch.ones(1, 4)).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert processors(ids, torch.ones(1, 4)).tolist() == [[1.0, 1.0, 0.5, 1.0]]
