"""The scheduler with a decoder whose tokens are known: simulated arrivals, cancellations and limits."""

import random
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.generation.slot_batch import SlotBatch
from tinystories_slm.serving.api_error import ApiError
from tinystories_slm.serving.choice import Choice, Piece
from tinystories_slm.serving.scheduler import Scheduler
from tinystories_slm.serving.stop_strings import StopStrings

VOCAB, STOP = 26, 0


def known_token(prompt: tuple[int, ...], position: int) -> int:
    """Token at `position` of the text with this prompt; one in 26 is the stop token."""
    return random.Random(f"{prompt} {position}").randrange(VOCAB)


class KnownDecoder:
    """A decoder whose cache holds the prompt of each slot, so that a mixed-up slot shows in the tokens."""

    def __init__(self, num_slots: int) -> None:
        self.embedding, self.config = torch.zeros(1), SimpleNamespace(vocab_size=VOCAB)
        self.prompts: list[tuple[int, ...] | None] = [None] * num_slots
        self.num_prefills = 0

    def prefill(self, token_ids, slots):
        self.num_prefills += 1
        for slot in slots:
            self.prompts[slot] = tuple(token_ids)
        return self._logits(tuple(token_ids), len(token_ids))

    def step(self, token_ids, positions):
        prompts = self.prompts[: len(token_ids)]
        for prompt, token, position in zip(prompts, token_ids, positions, strict=True):
            assert token == known_token(prompt, position)
        return torch.stack(
            [self._logits(prompt, at + 1) for prompt, at in zip(prompts, positions, strict=True)]
        )

    def copy_slot(self, source, target):
        self.prompts[target] = self.prompts[source]

    def _logits(self, prompt, position):
        return torch.nn.functional.one_hot(torch.tensor(known_token(prompt, position)), VOCAB) * 100.0


class Letters:
    """A detokenizer with one letter per token."""

    def add(self, token: int) -> str:
        return chr(ord("a") + token)

    def flush(self) -> str:
        return ""


def choice(index: int, prompt: list[int], limit: int) -> Choice:
    return Choice(
        index, prompt, limit, random.Random(0), SamplingParams(temperature=0.0),
        detokenizer=Letters(), stops=StopStrings([]), stop_ids=[STOP], emit=lambda _: None,
    )  # fmt: skip


def expected_tokens(one: Choice, limit: int) -> list[int]:
    prompt = tuple(one.prompt)
    tokens = [known_token(prompt, len(prompt) + at) for at in range(limit)]
    return tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens


def scheduler(num_slots: int = 3, max_waiting: int = 100) -> Scheduler:
    return Scheduler(SlotBatch(KnownDecoder(num_slots), num_slots), max_waiting)


def run_until_idle(subject: Scheduler) -> list[Piece]:
    pieces = []
    while subject.num_running or subject.num_waiting:
        pieces += subject.step()
    return pieces


ARRIVALS = st.lists(
    st.fixed_dictionaries(
        {
            "gap": st.integers(0, 4),
            "num_choices": st.integers(1, 4),
            "prompt": st.lists(st.integers(1, 3), min_size=1, max_size=3),
            "limit": st.integers(1, 12),
            "cancel_after": st.none() | st.integers(0, 8),
        }
    ),
    max_size=12,
)


@given(ARRIVALS, st.integers(1, 5))
def test_no_token_is_lost_doubled_or_given_to_another_choice(arrivals, num_slots):
    subject = scheduler(num_slots)
    due: dict[int, list] = {}
    cancels: dict[int, list[Choice]] = {}
    at, submitted = 0, []
    for arrival in arrivals:
        at += arrival["gap"]
        due.setdefault(at, []).append(arrival)
    limits, texts, first, cancelled_at, step = {}, {}, [], {}, 0
    while step <= at or subject.num_running or subject.num_waiting:
        for arrival in due.get(step, []):
            choices = [
                choice(len(submitted) + n, arrival["prompt"], arrival["limit"])
                for n in range(arrival["num_choices"])
            ]
            subject.submit(choices)
            submitted += choices
            limits |= dict.fromkeys(choices, arrival["limit"])
            if arrival["cancel_after"] is not None:
                cancels.setdefault(step + arrival["cancel_after"], []).append(choices[0])
        for one in cancels.get(step, []):
            one.is_cancelled = True
            cancelled_at[one] = step
        for piece in subject.step():
            one = piece.choice
            assert one not in cancelled_at, "a cancelled choice is out of the batch at the next boundary"
            if one not in texts:
                first.append(one)
            texts[one] = texts.get(one, "") + piece.text
        assert subject.num_running <= num_slots
        step += 1
        assert step < 2000

    assert [one.index for one in first] == sorted(one.index for one in first)  # first in, first out
    for one in submitted:
        expected = expected_tokens(one, limits[one])
        if one.finish_reason is None:
            assert one in cancelled_at and one.new_ids == expected[: len(one.new_ids)]
            continue
        assert one.new_ids == expected
        assert texts[one] == "".join(chr(ord("a") + token) for token in expected if token != STOP)
        assert one.finish_reason == ("stop" if expected[-1] == STOP else "length")
    ends = [subject.counts[reason] for reason in ("stop", "length", "cancelled")]
    assert sum(ends) == len(submitted) and subject.counts["completion_tokens"] == sum(
        len(one.new_ids) for one in submitted
    )


def test_a_freed_slot_is_used_at_the_next_boundary():
    subject = scheduler(num_slots=1)
    first, second = choice(0, [1], 50), choice(1, [2], 2)
    subject.submit([first, second])
    assert [piece.choice for piece in subject.step()] == [first]
    first.is_cancelled = True
    assert [piece.choice for piece in subject.step()] == [second]


def test_long_prompts_are_read_a_few_at_a_time_and_equal_ones_once():
    subject = scheduler(num_slots=20)
    running = choice(0, [1], 40)
    subject.submit([running])
    subject.step()
    long = [choice(1 + at, [1 + at % 20] * 300, 40) for at in range(4)]
    subject.submit(long)
    pieces = subject.step()
    assert [piece.choice for piece in pieces] == [running, long[0]]  # 2 x 364 tokens exceed 512

    subject = scheduler(num_slots=20)
    subject.submit([choice(at, [3] * 300, 40) for at in range(20)])
    assert len(subject.step()) == 20 and subject.batch.decoder.num_prefills == 1


def test_a_full_queue_rejects_all_choices_of_a_request():
    subject = scheduler(num_slots=2, max_waiting=3)
    subject.submit([choice(at, [1], 5) for at in range(4)])  # 2 slots and 3 places
    with pytest.raises(
        ApiError, match=r"queue is full \(4 waiting, 2 more requested\); retry after"
    ) as caught:
        subject.submit([choice(4, [1], 5), choice(5, [1], 5)])
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    assert subject.num_waiting == 4
    subject.check_room()
    subject.submit([choice(4, [1], 5)])
    with pytest.raises(ApiError, match=r"queue is full \(5 waiting, 1 more requested\)"):
        subject.check_room()
    assert {piece.choice.index for piece in run_until_idle(subject)} == {0, 1, 2, 3, 4}


def test_cancelled_choices_leave_the_queue():
    subject = scheduler(num_slots=1, max_waiting=1)
    running, waiting = choice(0, [1], 30), choice(1, [2], 30)
    subject.submit([running, waiting])
    subject.step()
    waiting.is_cancelled = True
    subject.step()
    assert (subject.num_waiting, subject.counts["cancelled"]) == (0, 1)
    subject.submit([choice(2, [1], 1)])


def test_run_sleeps_until_work_arrives_and_ends_with_close():
    subject, pieces, done = scheduler(), [], threading.Event()

    def deliver(step: list[Piece]) -> None:
        pieces.extend(step)
        if pieces[-1].finish_reason:
            done.set()

    thread = threading.Thread(target=subject.run, args=(deliver,))
    thread.start()
    one = choice(0, [1, 2], 6)
    subject.submit([one])
    assert done.wait(30)
    assert subject.close() == []
    thread.join(30)
    assert not thread.is_alive() and len(pieces) == len(one.new_ids)
    with pytest.raises(ApiError, match="the server is stopping") as caught:
        subject.submit([choice(1, [1], 2)])
    assert caught.value.status == 503


def test_close_returns_choices_whose_prompt_was_being_read():
    subject = scheduler(num_slots=2)
    subject.batch.decoder.prefill = lambda *_: 1 / 0
    choices = [choice(0, [1], 3), choice(1, [2], 3), choice(2, [3], 3)]
    subject.submit(choices)
    with pytest.raises(ZeroDivisionError):
        subject.step()
    assert subject.close() == choices
