"""Continuous batching: sequences join a running batch and leave it at a token boundary.

In transformers' `generate()`, a batch waits for its longest sequence. Here the slot of a finished sequence
goes to the next request. Shapes: N active sequences, V vocabulary size.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinystories_slm.config.command_args.generate import Backend
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.generation.decoder import Decoder
from tinystories_slm.generation.sampling import TokenLogprobs, request_rng, sample, token_logprobs
from tinystories_slm.model import TinyStoriesForCausalLM


def decode(
    model: TinyStoriesForCausalLM,
    input_ids: Tensor,
    *,
    seeds: Sequence[int],
    new_token_limits: Sequence[int],
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    batch_size: int,
    backend: Backend,
    suppressed_ids: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
    **model_kwargs: object,
) -> Iterator[tuple[int, list[int]]]:
    """Generate for all requests; yield (request index, new token ids) in the order in which they finish.

    The ids include the stop token. The caller is `model.generate(custom_generate=partial(decode, ...))`.

    Args:
        model: the model.
        input_ids: prompts (requests, T), padded on the left.
        seeds: one per request.
        new_token_limits: maximum number of new tokens, one per request.
        sampling: sampling parameters of all requests.
        stop_ids: token ids that end a sequence.
        batch_size: number of slots, the sequences that are decoded at the same time.
        backend: `torch` or `cpu`.
        suppressed_ids: token ids that are never sampled.
        on_token: called with each new token id.
        model_kwargs: `attention_mask` (requests, T) marks the padding; the rest is ignored.
    """
    # generate() would treat a parameter `attention_mask` as an option of `decode` alone and pass it twice.
    prompts = _remove_padding(input_ids, model_kwargs.get("attention_mask"))
    capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, new_token_limits, strict=True))
    num_slots = min(batch_size, len(prompts))
    with torch.inference_mode():
        batch = SlotBatch(Decoder(model, num_slots, capacity, backend), num_slots, suppressed_ids)
    waiting = deque(range(len(prompts)))
    while waiting or batch.sequences:
        indices = [waiting.popleft() for _ in range(_num_to_admit(batch, len(waiting)))]
        admitted = [
            ActiveSequence(
                index, prompts[index], new_token_limits[index], request_rng(seeds[index]), sampling
            )
            for index in indices
        ]
        tokens = batch.advance(admitted)
        if on_token is not None:
            for token in tokens:
                on_token(token)
        for sequence in batch.retire(lambda sequence: sequence.is_finished(stop_ids)):
            yield sequence.index, sequence.new_ids


def _remove_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def _num_to_admit(batch: "SlotBatch", num_waiting: int) -> int:
    """Return how many of the waiting requests get a slot now.

    Requests wait until an eighth of all slots is free: a prefill costs about as much as a step, and equal
    prompts that are admitted together share one.
    """
    free = batch.num_free_slots
    if num_waiting == 0 or free < max(1, min(batch.num_slots // 8, num_waiting)):
        return 0
    return min(free, num_waiting)


@dataclass(eq=False)
class ActiveSequence:
    """A request with a slot: prompt, new tokens and random numbers."""

    index: int
    """Index of the request, for the caller."""
    prompt: list[int]
    remaining: int
    """Number of tokens that may still be sampled."""
    rng: random.Random
    sampling: SamplingParams
    """Sampling parameters; `remaining` is the limit, not their `max_new_tokens`."""
    num_top_logprobs: int | None = None
    """Number of most probable tokens whose log-probabilities are kept for each new token; None keeps none."""
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per new token, if `num_top_logprobs` is not None."""

    @property
    def position(self) -> int:
        """Position of the last token."""
        return len(self.prompt) + len(self.new_ids) - 1

    def append(self, token: int) -> None:
        self.new_ids.append(token)
        self.remaining -= 1

    def is_finished(self, stop_ids: Sequence[int]) -> bool:
        """Whether the last token is a stop token or the limit is reached."""
        return self.new_ids[-1] in stop_ids or self.remaining == 0


class SlotBatch:
    """The active sequences; sequence i uses slot i of the decoder's cache.

    Prompt, sampling parameters and random numbers belong to a sequence, so no sequence changes the text of
    another one, up to rounding: matrix products of different batch sizes may sum in a different order.

    Args:
        decoder: a decoder with at least `num_slots` slots.
        num_slots: sequences that are decoded at the same time.
        suppressed_ids: token ids that are never sampled.
    """

    def __init__(self, decoder: Decoder, num_slots: int, suppressed_ids: Sequence[int] = ()) -> None:
        self.decoder, self.num_slots, self.suppressed_ids = decoder, num_slots, list(suppressed_ids)
        self.sequences: list[ActiveSequence] = []
        self._slots_by_sampling: dict[SamplingParams, list[int]] = {}
        self._device, self._vocab_size = decoder.embedding.device, decoder.config.vocab_size
        # (slots, V): the tokens that the repetition penalty applies to.
        self._generated = torch.zeros(num_slots, self._vocab_size, dtype=torch.bool, device=self._device)

    @property
    def num_free_slots(self) -> int:
        return self.num_slots - len(self.sequences)

    @torch.inference_mode()
    def advance(self, admitted: Sequence[ActiveSequence] = ()) -> list[int]:
        """Sample one token for each active sequence; those of `admitted`, which get free slots, come last.

        Each token is appended to its sequence. Equal prompts of `admitted` are read once.

        Returns:
            The tokens, in the order of `sequences`.
        """
        logits = self._step()
        if admitted:
            logits = torch.cat([logits, self._admit(admitted)])
        if self.suppressed_ids:
            logits[:, self.suppressed_ids] = -math.inf
        tokens = self._sample(logits)
        self._keep_logprobs(logits, tokens)
        for sequence, token in zip(self.sequences, tokens, strict=True):
            sequence.append(token)
        return tokens

    def _step(self) -> Tensor:
        """Return the next logits (N, V) of the active sequences."""
        if not self.sequences:
            return torch.empty(0, self._vocab_size, device=self._device)
        return self.decoder.step(
            [sequence.new_ids[-1] for sequence in self.sequences],
            [sequence.position for sequence in self.sequences],
        )

    def _admit(self, admitted: Sequence[ActiveSequence]) -> Tensor:
        """Give each sequence a free slot; return the logits (len(admitted), V) of the first new tokens."""
        first_slot = len(self.sequences)
        rows_of_prompt: dict[tuple[int, ...], list[int]] = {}
        for row, sequence in enumerate(admitted):
            rows_of_prompt.setdefault(tuple(sequence.prompt), []).append(row)
        logits = torch.empty(len(admitted), self._vocab_size, device=self._device)
        for prompt, rows in rows_of_prompt.items():
            logits[rows] = self.decoder.prefill(list(prompt), [first_slot + row for row in rows])
        self.sequences.extend(admitted)
        self._generated[first_slot : len(self.sequences)] = False
        self._group_by_sampling()
        return logits

    def _group_by_sampling(self) -> None:
        """Group the slots whenever sequences join or leave, not in each step."""
        self._slots_by_sampling = {}
        for slot, sequence in enumerate(self.sequences):
            self._slots_by_sampling.setdefault(sequence.sampling, []).append(slot)

    def _sample(self, logits: Tensor) -> list[int]:
        """Return one token per row of `logits` (N, V)."""
        tokens = torch.empty(len(logits), dtype=torch.int64, device=self._device)
        for sampling, slots in self._slots_by_sampling.items():
            rows = logits if len(slots) == len(logits) else logits[slots]
            penalty = sampling.repetition_penalty
            if penalty != 1.0:
                rows = _apply_repetition_penalty(rows, self._generated[slots], penalty)
            sampled = sample(sampling, rows, [self.sequences[slot].rng for slot in slots])
            if penalty != 1.0:
                self._generated[slots, sampled] = True
            tokens[slots] = sampled
        return tokens.tolist()

    def _keep_logprobs(self, logits: Tensor, tokens: Sequence[int]) -> None:
        for slot, sequence in enumerate(self.sequences):
            if sequence.num_top_logprobs is not None:
                sequence.logprobs += token_logprobs(
                    logits[slot : slot + 1], [tokens[slot]], sequence.num_top_logprobs
                )

    def retire(self, is_finished: Callable[[ActiveSequence], bool]) -> list[ActiveSequence]:
        """Remove and return the sequences that are finished; the last sequences move into their slots."""
        slots = [slot for slot, sequence in enumerate(self.sequences) if is_finished(sequence)]
        finished = [self.sequences[slot] for slot in slots]
        for slot in reversed(slots):
            last = self.sequences.pop()
            if slot < len(self.sequences):
                self._move_last_slot(slot)
                self.sequences[slot] = last
        if finished:
            self._group_by_sampling()
        return finished

    @torch.inference_mode()
    def _move_last_slot(self, target: int) -> None:
        source = len(self.sequences)
        self.decoder.copy_slot(source, target)
        self._generated[target] = self._generated[source]


def _apply_repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return the scores (N, V) of `RepetitionPenaltyLogitsProcessor`; `seen` (N, V) marks the tokens."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
