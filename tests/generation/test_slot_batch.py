"""Sequences that join and leave a running batch, each with its own sampling parameters."""

import pytest
import torch
from conftest import tiny_model
from generation.test_decoder import BACKENDS, random_prompts

from tinystories_slm.generation import SamplingParams
from tinystories_slm.generation.decoder import Decoder, cache_bytes
from tinystories_slm.generation.sampling import request_rng, token_logprobs
from tinystories_slm.generation.slot_batch import ActiveSequence, SlotBatch

SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(temperature=1.2, top_k=0, top_p=1.0),
    SamplingParams(top_k=5, repetition_penalty=1.3),
]


def sequences(num: int, **options) -> list[ActiveSequence]:
    prompts = random_prompts([1 + 3 * (at % 7) for at in range(num)])
    return [
        ActiveSequence(at, prompt, 4 + 5 * (at % 4), request_rng(at), SAMPLINGS[at % 4], **options)
        for at, prompt in enumerate(prompts)
    ]


def generate_alone(model, backend: str, sequence: ActiveSequence) -> ActiveSequence:
    batch = SlotBatch(Decoder(model, 1, 48, backend), 1)
    batch.advance([sequence])
    while not sequence.is_finished([]):
        batch.advance()
    return sequence


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_that_join_and_leave_change_no_text(backend):
    model = tiny_model()
    expected = [generate_alone(model, backend, sequence).new_ids for sequence in sequences(20)]
    assert len({tuple(ids) for ids in expected}) == 20

    batch, waiting, finished = SlotBatch(Decoder(model, 6, 48, backend), 6), sequences(20), {}
    step = 0
    while waiting or batch.sequences:
        num_joining = min(step % 3, batch.num_free_slots, len(waiting))
        batch.advance([waiting.pop(0) for _ in range(num_joining)])
        for sequence in batch.retire(lambda sequence: sequence.is_finished([])):
            finished[sequence.index] = sequence.new_ids
        step += 1
    assert [finished[at] for at in range(20)] == expected


def test_a_sequence_that_is_retired_early_frees_its_slot_and_changes_no_text():
    model = tiny_model()
    expected = [generate_alone(model, "torch", sequence).new_ids for sequence in sequences(5)]
    batch, [first, *others, late] = SlotBatch(Decoder(model, 4, 48, "torch"), 4), sequences(5)
    batch.advance([first, *others])
    assert batch.num_free_slots == 0
    assert batch.retire(lambda sequence: sequence is first) == [first]
    assert batch.num_free_slots == 1
    batch.advance([late])
    while batch.sequences:
        batch.retire(lambda sequence: sequence.is_finished([]))
        if batch.sequences:
            batch.advance()
    assert [sequence.new_ids for sequence in [*others, late]] == expected[1:]
    assert first.new_ids == expected[0][:1]


def test_logprobs_are_those_of_the_model_before_temperature():
    """Suppressed tokens have none, and sequences that keep none are not slowed down by those that do."""
    model = tiny_model()
    [kept, plain] = sequences(2, num_top_logprobs=3)
    plain.num_top_logprobs = None
    batch = SlotBatch(Decoder(model, 2, 48, "torch"), 2, suppressed_ids=[7])
    batch.advance([kept, plain])
    batch.advance()

    assert plain.logprobs == [] and len(kept.logprobs) == 2
    for at, logprobs in enumerate(kept.logprobs):
        ids = torch.tensor([kept.prompt + kept.new_ids[:at]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        logits[7] = -torch.inf
        best = logits.log_softmax(-1).topk(3)
        assert [token for token, _ in logprobs.top] == best.indices.tolist()
        torch.testing.assert_close(
            [value for _, value in logprobs.top], best.values.tolist(), atol=1e-4, rtol=0
        )
        assert logprobs.token == kept.new_ids[at]
        assert abs(logprobs.logprob - logits.log_softmax(-1)[logprobs.token].item()) < 1e-4


def test_token_logprobs_without_top_tokens_are_those_of_the_tokens():
    scores = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    first, second = token_logprobs(scores, [0, 1], 0)
    assert first.top == second.top == []
    assert first.logprob == pytest.approx(-1.3133, abs=1e-4) and second.logprob == pytest.approx(
        -0.6931, abs=1e-4
    )


@pytest.mark.parametrize("family", [{"family": "gpt2"}, {"family": "llama", "num_key_value_heads": 2}])
def test_cache_bytes_are_those_of_the_tensors(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(**family).to(dtype)
        decoder = Decoder(model, 3, 41, "torch")
        tensors = [tensor for layer in decoder.layers for tensor in (layer.keys, layer.values)]
        assert cache_bytes(model.config, 3, 41, dtype) == sum(tensor.nbytes for tensor in tensors)
