"""Comparison of several models on the same stories."""

import math
from collections.abc import Sequence
from typing import Any

from tinystories_slm.evaluation.bootstrap import (
    CONFIDENCE,
    NUM_RESAMPLES,
    SEED,
    Interval,
    Resamples,
    percentile_interval,
)
from tinystories_slm.evaluation.scoring import ModelScores

_SHARED = (
    "data", "revision", "subset", "split", "selection", "validation_fraction", "num_split_stories",
    "num_source_stories", "num_stories", "num_bytes", "cleaning", "protocol",
)  # fmt: skip
"""Keys of the scores of a model that are the same for all models."""


def compare_models(results: Sequence[dict[str, Any]], scores: Sequence[ModelScores]) -> dict[str, Any]:
    """Return the scores of several models with the difference of each from the first.

    The difference is in bits per byte of the text without its end token, which not every model has: those of
    the model minus those of the first. Each result gets `difference` and, in `intervals`, its paired
    interval. They are missing if the tokenizer of either model loses text.
    """
    first = scores[0]
    for result, model_scores in list(zip(results, scores, strict=True))[1:]:
        if not (first.is_lossy or model_scores.is_lossy):
            result["difference"] = result["text_bits_per_byte"] - results[0]["text_bits_per_byte"]
            result["intervals"]["difference"] = paired_difference_interval(first, model_scores)
    bootstrap = {"confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES, "seed": SEED}
    return {
        **{name: results[0][name] for name in _SHARED},
        "bootstrap": bootstrap,
        "reference": results[0]["model"],
        "models": list(results),
    }


def paired_difference_interval(first: ModelScores, other: ModelScores) -> Interval | None:
    """Return the interval of `other` minus `first`, in bits per byte of the text of the same stories."""
    num_stories = len(first.num_bytes)
    if num_stories < 2:
        return None
    difference = other.text_nats - first.text_nats
    return percentile_interval(Resamples(num_stories).ratios(difference, math.log(2) * first.num_bytes))
