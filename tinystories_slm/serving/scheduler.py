"""The queue before the batch, and the thread that decodes.

Requests are admitted in the order of their arrival, at a token boundary, as soon as a slot is free.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from tinystories_slm.generation.sampling import token_logprobs
from tinystories_slm.generation.slot_batch import SlotBatch
from tinystories_slm.serving.api_error import ApiError
from tinystories_slm.serving.choice import Choice, Piece, ScoredToken

# The running requests wait for each prefill. One takes as long as some tokens more than its prompt has.
_MAX_PREFILL_TOKENS = 512
_PREFILL_OVERHEAD_TOKENS = 64
_RETRY_AFTER_S = 1


class Scheduler:
    """Requests that wait, first in, first out, and the batch that they join.

    `submit` may be called from any thread, `step` from one thread.

    Args:
        batch: an empty batch.
        max_waiting: number of choices that wait for a slot, at most.
    """

    def __init__(self, batch: SlotBatch, max_waiting: int) -> None:
        self.batch, self.max_waiting = batch, max_waiting
        self.counts: Counter[str] = Counter()
        """Prompt tokens, completion tokens, and choices by finish reason."""
        self._waiting: deque[Choice] = deque()
        self._admitted: list[Choice] = []
        self._changed = threading.Condition()
        self._is_closed = False

    @property
    def num_running(self) -> int:
        return len(self.batch.sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, choices: Sequence[Choice]) -> None:
        """Append all choices of a request to the queue.

        Raises:
            ApiError: the queue has no place for all of them, or the scheduler is closed.
        """
        with self._changed:
            self._check_room(len(choices))
            self._waiting.extend(choices)
            self._changed.notify()

    def check_room(self) -> None:
        """Check that a request may be read: a full queue keeps none in memory.

        Raises:
            ApiError: as for `submit`.
        """
        with self._changed:
            self._check_room(1)

    def _check_room(self, num_choices: int) -> None:
        if self._is_closed:
            raise ApiError(503, "the server is stopping; use another one")
        room = self.max_waiting + self.batch.num_free_slots - len(self._waiting)
        if num_choices > room:
            raise ApiError(
                429,
                f"the queue is full ({len(self._waiting)} waiting, {num_choices} more requested); "
                f"retry after {_RETRY_AFTER_S} s",
                code="queue_full",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )

    def step(self) -> list[Piece]:
        """Decode one token of each running choice and the first token of newly admitted ones."""
        self._retire(lambda choice: choice.is_cancelled)
        with self._changed:
            self._admitted = admitted = self._take_admitted()
        for choice in admitted:
            self.counts["prompt_tokens"] += len(choice.prompt)
            if choice.prompt_offsets is not None:
                choice.prompt_tokens = score_prompt(self.batch.decoder.model, choice)
        if not admitted and not self.batch.sequences:
            return []
        tokens = self.batch.advance(admitted)
        pieces = [choice.take(token) for choice, token in zip(self.batch.sequences, tokens, strict=True)]
        self.counts["completion_tokens"] += len(tokens)
        self._retire(lambda choice: choice.finish_reason is not None)
        return pieces

    def _retire(self, is_finished: Callable[[Choice], bool]) -> None:
        for choice in self.batch.retire(is_finished):
            self.counts[choice.finish_reason or "cancelled"] += 1

    def _take_admitted(self) -> list[Choice]:
        """Remove the choices from the queue that are admitted now; drop cancelled ones."""
        self._drop_cancelled()
        admitted: list[Choice] = []
        prompts: set[tuple[int, ...]] = set()
        num_tokens = 0
        while self._waiting and len(admitted) < self.batch.num_free_slots:
            prompt = tuple(self._waiting[0].prompt)
            if prompt not in prompts:  # equal prompts are read once
                num_tokens += len(prompt) + _PREFILL_OVERHEAD_TOKENS
                if admitted and num_tokens > _MAX_PREFILL_TOKENS:
                    break
                prompts.add(prompt)
            admitted.append(self._waiting.popleft())
        return admitted

    def _drop_cancelled(self) -> None:
        kept = [choice for choice in self._waiting if not choice.is_cancelled]
        self.counts["cancelled"] += len(self._waiting) - len(kept)
        self._waiting = deque(kept)

    def run(self, deliver: Callable[[list[Piece]], None]) -> None:
        """Call `step` while there is work, and `deliver` with its result, until `close`."""
        while self._wait_for_work():
            if pieces := self.step():
                deliver(pieces)

    def _wait_for_work(self) -> bool:
        """Block until there is work; return False after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._waiting or self.batch.sequences)
            return not self._is_closed

    def close(self) -> list[Choice]:
        """End `run` at the next token boundary; return the choices that are not finished."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            # After an error those that were admitted last may not be in the batch yet.
            return list(dict.fromkeys([*self.batch.sequences, *self._admitted, *self._waiting]))


@torch.inference_mode()
def score_prompt(model: PreTrainedModel, choice: Choice) -> list[ScoredToken]:
    """Return the log-probabilities of the prompt's tokens, with one more forward pass."""
    ids = torch.tensor([choice.prompt], device=model.device)
    logits = model(ids).logits[0, :-1]
    scores = token_logprobs(logits, choice.prompt[1:], choice.num_top_logprobs)
    prompt = zip(choice.prompt, [None, *scores], choice.prompt_offsets, strict=True)
    return [ScoredToken(token, logprobs, offset) for token, logprobs, offset in prompt]
