"""Likelihood of stories under a causal language model: each token is scored once, and sums are divided once.

The protocol applies to any model and tokenizer. Each story is scored separately, between the start and end
tokens of the model (`text_boundaries`), and every token after the start is predicted once. A story longer
than the model's context is split into windows that overlap by half, so that each later token has at least
half a context before it. Losses are in nats. Sums are kept in float64 and divided once, so neither the batch
size nor the order of the stories matters.

A model that was trained without any start token cannot predict the first token of a story. This token then
costs ln(vocabulary size) nats, a uniform guess, so that every byte of the story is paid for.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel


@dataclass(frozen=True)
class StoryScores:
    """Scores of N stories: arrays of shape (N,) with sums over the tokens of each story."""

    nats: np.ndarray
    """Negative log-likelihood, float64."""
    num_correct: np.ndarray
    """Number of tokens that equal the argmax of the model, int64."""
    num_tokens: np.ndarray
    """Number of predicted tokens, including the end token if it is scored, int64."""
    token_nats: np.ndarray
    """Negative log-likelihood of each token, float64: one story after another, (sum of `num_tokens`,)."""
    token_ranks: np.ndarray | None = None
    """1 plus the number of ids with a higher probability than the token, int64, like `token_nats`; 0 for a
    uniform guess. None unless requested."""
    token_entropies: np.ndarray | None = None
    """Entropy of the prediction of each token in nats, float64, like `token_nats`; None unless requested."""

    @property
    def token_story(self) -> np.ndarray:
        """Story of each token in `token_nats`, int64."""
        return np.repeat(np.arange(len(self.num_tokens)), self.num_tokens)

    def totals(self, prompt_lengths: np.ndarray | None = None) -> tuple[float, int]:
        """Return nats and number of tokens, without the first `prompt_lengths` (N,) tokens of each story."""
        if prompt_lengths is None:
            return float(self.nats.sum()), int(self.num_tokens.sum())
        first_tokens = np.cumsum(self.num_tokens) - self.num_tokens
        in_story = np.arange(len(self.token_nats)) - first_tokens[self.token_story]
        counted = in_story >= prompt_lengths[self.token_story]
        return float(self.token_nats[counted].sum()), int(counted.sum())


class _RowScores(NamedTuple):
    """Scores of the tokens at the end of a window, (num_scored,) each, on the CPU."""

    nats: Tensor
    num_correct: int
    ranks: Tensor | None
    entropies: Tensor | None


@dataclass(frozen=True)
class _ScoringWindow:
    story: int
    token_ids: Sequence[int]
    first_scored: int
    """Index of the first scored token among the scored tokens of the story."""
    num_scored: int
    """Number of tokens scored at the end of the window; the tokens before them are context."""


def metrics_from_sums(
    *, nats: float, num_correct: int, num_tokens: int, num_bytes: int, num_stories: int
) -> dict:
    """Return the metrics of one evaluation from its sums; `loss` is in nats per token."""
    loss = nats / num_tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "accuracy": num_correct / num_tokens,
        "num_tokens": int(num_tokens),
        "num_bytes": int(num_bytes),
        "num_stories": int(num_stories),
    }


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of token ids that `model` has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]


@torch.no_grad()
def score_stories(
    model: PreTrainedModel,
    stories: Sequence[Sequence[int]],
    *,
    eos_token_id: int | None,
    start_ids: Sequence[int] = (),
    batch_size: int,
    autocast: AbstractContextManager | None = None,
    progress: bool = False,
    with_predictions: bool = False,
) -> StoryScores:
    """Score sequences of token ids (without start and end token) by the protocol of this module.

    `eos_token_id` ends each story, and precedes it if there are no `start_ids`. If it is None, no end is
    scored; without `start_ids`, the first token then costs a uniform guess. The model runs in evaluation mode
    and is then reset to its previous mode. `autocast` is a context manager for forward passes in lower
    precision. `with_predictions` also returns ranks and entropies.
    """
    start = list(start_ids) or ([] if eos_token_id is None else [eos_token_id])
    end = [] if eos_token_id is None else [eos_token_id]
    context = getattr(model.config, "max_position_embeddings", None) or max(map(len, stories)) + 1
    windows = [
        window
        for i, ids in enumerate(stories)
        for window in _split_into_windows(i, [*start, *ids, *end], max(1, len(start)), len(start), context)
    ]
    # Sorting by length minimizes padding; with the longest first, a lack of memory shows immediately.
    windows.sort(key=lambda window: len(window.token_ids), reverse=True)

    nats = np.zeros(len(stories))
    num_correct = np.zeros(len(stories), dtype=np.int64)
    num_tokens = np.array([len(ids) + len(end) for ids in stories], dtype=np.int64)
    first_tokens = np.cumsum(num_tokens) - num_tokens
    token_nats, token_entropies = np.zeros(num_tokens.sum()), np.zeros(num_tokens.sum())
    token_ranks = np.zeros(num_tokens.sum(), dtype=np.int64)
    if not start:
        guess_nats = math.log(vocabulary_size(model))
        token_nats[first_tokens[num_tokens > 0]] = guess_nats
        nats[num_tokens > 0] = guess_nats
        token_entropies[first_tokens[num_tokens > 0]] = guess_nats
    was_training = model.training
    model.eval()
    with (
        autocast or nullcontext(),
        # None: only on a terminal, because a log file would fill with carriage returns.
        tqdm(total=len(windows), desc="score", unit="window", disable=None if progress else True) as bar,
    ):
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            rows = _score_batch(model, batch, with_predictions)
            for window, row in zip(batch, rows, strict=True):
                nats[window.story] += row.nats.sum().item()
                num_correct[window.story] += row.num_correct
                position = first_tokens[window.story] + window.first_scored
                scored = slice(position, position + window.num_scored)
                token_nats[scored] = row.nats.numpy()
                if with_predictions:
                    token_ranks[scored], token_entropies[scored] = row.ranks, row.entropies
            bar.update(len(batch))
    model.train(was_training)
    return StoryScores(
        nats=nats,
        num_correct=num_correct,
        num_tokens=num_tokens,
        token_nats=token_nats,
        token_ranks=token_ranks if with_predictions else None,
        token_entropies=token_entropies if with_predictions else None,
    )


def _split_into_windows(
    story: int, tokens: Sequence[int], scored_from: int, num_start: int, context: int
) -> list[_ScoringWindow]:
    """Split a story into one window, or into several that overlap by half if it exceeds the context.

    `tokens` include the start, of `num_start` tokens, and the end; those from index `scored_from` are
    predicted. The model reads the first n - 1 tokens of a window of n, so a window may have context + 1
    tokens.
    """
    windows = []
    scored_to = scored_from
    start = 0
    while scored_to < len(tokens):
        end = min(start + context + 1, len(tokens))
        windows.append(_ScoringWindow(story, tokens[start:end], scored_to - num_start, end - scored_to))
        scored_to = end
        start += max(1, context // 2)
    return windows


def _score_batch(
    model: PreTrainedModel, batch: Sequence[_ScoringWindow], with_predictions: bool
) -> list[_RowScores]:
    """Return the scores of the scored tokens of each window."""
    max_length = len(batch[0].token_ids)
    # Causal attention never reads padding on the right, so no mask is needed, and any id will do.
    padded = torch.full((len(batch), max_length), batch[0].token_ids[0])
    for row, window in enumerate(batch):
        padded[row, : len(window.token_ids)] = torch.as_tensor(window.token_ids)
    padded = padded.to(model.device)
    logits = model(input_ids=padded[:, :-1], use_cache=False).logits  # (B, T - 1, V)
    return [
        _score_row(logits[row], padded[row, 1:], window, with_predictions) for row, window in enumerate(batch)
    ]


def _score_row(logits: Tensor, targets: Tensor, window: _ScoringWindow, with_predictions: bool) -> _RowScores:
    scored = slice(len(window.token_ids) - 1 - window.num_scored, len(window.token_ids) - 1)
    row_logits = logits[scored].float()  # (num_scored, V)
    row_targets = targets[scored]
    loss = torch.nn.functional.cross_entropy(row_logits, row_targets, reduction="none")
    correct = row_logits.argmax(dim=-1) == row_targets
    ranks = entropies = None
    if with_predictions:
        target_logits = row_logits.gather(1, row_targets[:, None])
        ranks = 1 + (row_logits > target_logits).sum(dim=1).cpu()
        entropies = torch.distributions.Categorical(logits=row_logits, validate_args=False).entropy()
        entropies = entropies.cpu().double()
    return _RowScores(loss.cpu().double(), int(correct.sum()), ranks, entropies)  # MPS has no float64
