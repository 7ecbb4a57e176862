"""Scores of one model on stories: sums over each story, and the metrics, intervals and buckets of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.data.tokenizer import count_lost_bytes, encode_stories
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.bootstrap import Resamples, percentile_interval
from tinystories_slm.evaluation.breakdown import scores_by_length, scores_by_position, token_ends
from tinystories_slm.evaluation.likelihood import StoryScores, score_stories, vocabulary_size
from tinystories_slm.evaluation.metric import StoryLikelihood
from tinystories_slm.evaluation.scored_boundaries import EndToken, ScoredBoundaries, find_scored_boundaries


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Scores of N stories under one model."""

    scores: StoryScores
    boundaries: ScoredBoundaries
    start: str | None
    """Text of the start token, such as `<s>`; None if nothing precedes the first token."""
    end: str | None
    """Text of the end token; None if no end is scored."""
    num_bytes: np.ndarray
    """UTF-8 bytes of each story, int64, (N,)."""
    lost_bytes: np.ndarray
    """Bytes of each story that the tokenizer cannot spell, int64, (N,)."""

    @property
    def is_lossy(self) -> bool:
        """Whether the tokenizer loses text; bits per byte are then undefined."""
        return bool(self.lost_bytes.any())

    @property
    def is_text_token(self) -> np.ndarray:
        """Whether each token in `scores.token_nats` is one of the text, and no end token."""
        mask = np.ones(len(self.scores.token_nats), dtype=bool)
        if self.boundaries.end_id is not None:
            mask[np.cumsum(self.scores.num_tokens) - 1] = False
        return mask

    @property
    def text_nats(self) -> np.ndarray:
        """Nats of each story without its end token, float64, (N,)."""
        of_text = self.is_text_token
        weights = self.scores.token_nats[of_text]
        return np.bincount(self.scores.token_story[of_text], weights, len(self.num_bytes))

    @property
    def num_text_tokens(self) -> np.ndarray:
        """Tokens of each story without its end token, int64, (N,)."""
        return self.scores.num_tokens - (self.boundaries.end_id is not None)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics over all stories, and how they were scored.

        If the tokenizer loses text, `lost_bytes`, `lost_share` and `num_lossy_stories` replace
        `bits_per_byte` and `text_bits_per_byte`.
        """
        metric = StoryLikelihood(keep_in_memory=True)
        metric.add_batch(
            nats=self.scores.nats,
            num_correct=self.scores.num_correct,
            num_tokens=self.scores.num_tokens,
            num_bytes=self.num_bytes,
        )
        result = metric.compute()
        result["text_bits_per_byte"] = math.fsum(self.text_nats) / math.log(2) / result["num_bytes"]
        if self.is_lossy:
            del result["bits_per_byte"], result["text_bits_per_byte"]  # the model has not seen these bytes
            num_lost = int(self.lost_bytes.sum())
            result |= {"lost_bytes": num_lost, "lost_share": num_lost / result["num_bytes"]}
            result["num_lossy_stories"] = int((self.lost_bytes > 0).sum())
        return result | {"start": self.start, "end": self.end, "end_reason": self.boundaries.end_reason}

    def intervals(self) -> dict[str, list[float] | None]:
        """Return the 95 % interval of each metric; None with fewer than two stories (`bootstrap`)."""
        names = ["loss", "perplexity", "accuracy"]
        names += [] if self.is_lossy else ["bits_per_byte", "text_bits_per_byte"]
        if len(self.num_bytes) < 2:
            return dict.fromkeys(names)
        nats, correct, tokens, size, text = Resamples(len(self.num_bytes)).sums(
            self.scores.nats, self.scores.num_correct, self.scores.num_tokens, self.num_bytes, self.text_nats
        )
        loss, bits = nats / tokens, np.log(2) * size
        samples = [loss, np.exp(np.minimum(loss, 700.0)), correct / tokens, nats / bits, text / bits]
        return {name: percentile_interval(values) for name, values in zip(names, samples, strict=False)}

    def buckets(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Any]:
        """Return the scores of the text by position in the story and by its length (`breakdown`)."""
        token_nats = self.scores.token_nats[self.is_text_token]
        ends, lossy = token_ends(tokenizer, texts), self.is_lossy
        by_length = scores_by_length(self.text_nats, self.num_text_tokens, self.num_bytes, is_lossy=lossy)
        by_position = scores_by_position(token_nats, ends, is_lossy=lossy)
        return {"by_position": by_position, "by_length": by_length}


def score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int,
    end_token: EndToken = "auto",
    boundaries: ScoredBoundaries | None = None,
    with_predictions: bool = False,
    progress: bool = False,
) -> ModelScores:
    """Score `texts` by the protocol in `evaluation.likelihood`.

    `boundaries` are those that an earlier call found; None finds them with the first of `texts`. A story
    without text has the score of its end token. A single word has no context but the start.

    Raises:
        UserError: no story has text, the tokenizer has ids that the model lacks, or a score is not finite.
    """
    if not any(texts):
        raise UserError(f"data ({len(texts)} stories): must contain text; use other stories")
    ids = encode_stories(tokenizer, texts)
    _check_ids(model, ids)
    if boundaries is None:
        boundaries = find_scored_boundaries(model, tokenizer, ids, end_token=end_token, batch_size=batch_size)
    _check_ids(model, [boundaries.start_ids])
    scores = score_stories(
        model,
        ids,
        eos_token_id=boundaries.end_id,
        start_ids=boundaries.start_ids,
        batch_size=batch_size,
        progress=progress,
        with_predictions=with_predictions,
    )
    _check_finite(model, scores)
    end_ids = [] if boundaries.end_id is None else [boundaries.end_id]
    return ModelScores(
        scores=scores,
        boundaries=boundaries,
        start="".join(tokenizer.convert_ids_to_tokens(boundaries.start_ids)) or None,
        end="".join(tokenizer.convert_ids_to_tokens(end_ids)) or None,
        num_bytes=np.array([len(text.encode("utf-8")) for text in texts], dtype=np.int64),
        lost_bytes=np.array(count_lost_bytes(tokenizer, texts, ids), dtype=np.int64),
    )


def _check_ids(model: PreTrainedModel, stories: Sequence[Sequence[int]]) -> None:
    """Check that the embedding has a row for each token.

    Raises:
        UserError: an id is too large.
    """
    rows = vocabulary_size(model)
    if (largest := max((max(ids) for ids in stories if ids), default=0)) >= rows:
        raise UserError(
            f"model ({model.name_or_path}): the tokenizer gives token ids up to {largest}, but the embedding "
            f"has {rows} rows; use the tokenizer that the model was trained with"
        )


def _check_finite(model: PreTrainedModel, scores: StoryScores) -> None:
    """Check that each log-probability is a finite number.

    Raises:
        UserError: one is not; it names weights that are not finite.
    """
    num_bad = int((~np.isfinite(scores.nats)).sum())
    if not num_bad:
        return
    damaged = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    cause = (
        f"{len(damaged)} of its weights are not finite, such as {damaged[0]}"
        if damaged
        else (f"its computation overflows in {str(model.dtype).removeprefix('torch.')}")
    )
    fix = "use an earlier checkpoint or another copy" if damaged else "use --dtype float32, or another model"
    raise UserError(
        f"model ({model.name_or_path}): the log-probabilities of {num_bad} of {len(scores.nats)} stories are "
        f"not finite, because {cause}; {fix}"
    )
