"""Start and end tokens of the scored stories: those that the model was trained with.

The files of a model state its special tokens, and not whether training used them. A model that read texts
without end tokens gives its end token almost no probability after a story. This is measured on some stories,
and such a token is neither scored nor put before a story.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.evaluation.likelihood import score_stories, vocabulary_size
from tinystories_slm.model import TinyStoriesConfig
from tinystories_slm.text_boundaries import text_boundaries

EndToken = Literal["auto", "scored", "unscored"]

_NUM_PROBE_STORIES = 64
# Of a uniform guess, 1 / vocabulary size.
_MIN_END_PROBABILITY = 0.1


@dataclass(frozen=True, kw_only=True)
class ScoredBoundaries:
    """Start and end of the scored stories of one model."""

    start_ids: list[int]
    """Ids before each story; empty if the first token has nothing before it."""
    end_id: int | None
    """Id after each story, which is scored; None if no end is scored."""
    end_reason: str
    """Reason why the end is scored, or is not."""


def find_scored_boundaries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stories: Sequence[Sequence[int]],
    *,
    end_token: EndToken = "auto",
    batch_size: int,
) -> ScoredBoundaries:
    """Return the boundaries that `model` was trained with.

    The end token of a model that was trained here is always scored. That of another model is scored if its
    median probability after the first 64 `stories` (token ids) is at least a tenth of a uniform guess.
    """
    found = text_boundaries(model, tokenizer)
    start_ids, end_id = found.context_ids, found.end_id
    if end_id is None or end_id >= vocabulary_size(model):
        is_scored, reason = False, "the tokenizer has no end token that the model knows"
    elif end_token != "auto":
        is_scored, reason = end_token == "scored", f"by the option end_token ({end_token})"
    elif _was_trained_here(model):
        is_scored, reason = True, "trained here"
    else:
        is_scored, reason = _is_end_known(model, start_ids, end_id, stories, batch_size)
    if is_scored:
        return ScoredBoundaries(start_ids=start_ids, end_id=end_id, end_reason=reason)
    # A start token that is also the end token was not seen, either.
    start_ids = [] if start_ids in ([end_id], [tokenizer.eos_token_id]) else start_ids
    return ScoredBoundaries(start_ids=start_ids, end_id=None, end_reason=reason)


def _was_trained_here(model: PreTrainedModel) -> bool:
    """Whether the model is ours in any form; an export as a class of transformers records its data."""
    is_own = model.config.model_type == TinyStoriesConfig.model_type
    return is_own or bool(getattr(model.config, "training_data", None))


def _is_end_known(
    model: PreTrainedModel,
    start_ids: Sequence[int],
    end_id: int,
    stories: Sequence[Sequence[int]],
    batch_size: int,
) -> tuple[bool, str]:
    probe = stories[:_NUM_PROBE_STORIES]
    scores = score_stories(model, probe, eos_token_id=end_id, start_ids=start_ids, batch_size=batch_size)
    end_nats = scores.token_nats[np.cumsum(scores.num_tokens) - 1]
    probability = math.exp(-np.median(end_nats))
    limit = _MIN_END_PROBABILITY / vocabulary_size(model)
    is_known = not probability < limit  # NaN is an error of the scores
    comparison = "at least" if is_known else "below"
    return is_known, (
        f"its median probability after a story is {probability:.1g}, {comparison} a tenth of a uniform guess"
    )
