"""Stories of the built-in corpus against its grammar, and the distance of a model's loss from the entropy."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm import grammar
from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.grammar import Diagnosis, diagnose
from tinystories_slm.report_card.measures import CardStory
from tinystories_slm.text_boundaries import text_boundaries


def entropy_distances(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int
) -> np.ndarray:
    """Return (N,) nats per token that the model needs for each story beyond those of the grammar."""
    boundaries = text_boundaries(model, tokenizer)
    scores = score_stories(
        model,
        encode_stories(tokenizer, texts),
        eos_token_id=boundaries.end_id,
        start_ids=boundaries.context_ids,
        batch_size=batch_size,
    )
    entropies = -np.array([grammar.log_prob(text) for text in texts])
    return (scores.nats - entropies) / scores.num_tokens


def diagnose_stories(stories: Sequence[CardStory]) -> list[Diagnosis]:
    """Return the first break of each story."""
    return [diagnose(story.text) for story in stories]


def accepted_shares(found: Sequence[Diagnosis]) -> np.ndarray:
    """Return (N,) 1 for each story that the grammar accepts whole, else 0."""
    return np.array([one.constraint is None for one in found], dtype=float)


def correct_shares(stories: Sequence[CardStory], found: Sequence[Diagnosis]) -> np.ndarray:
    """Return the share of each story's characters before its first break; none for empty stories."""
    return np.array(
        [
            1.0 if one.position is None else one.position / len(story.text)
            for story, one in zip(stories, found, strict=True)
            if story.text
        ]
    )


def count_breaks(found: Sequence[Diagnosis]) -> dict[str, int]:
    """Return how many stories break each constraint first, the most frequent first."""
    return dict(Counter(one.constraint for one in found if one.constraint is not None).most_common())


def shares_by_plot(found: Sequence[Diagnosis]) -> dict[str, dict[str, Any]]:
    """Return the number of stories of each plot and how many of them the grammar accepts."""
    plots = sorted({one.plot or "no plot" for one in found})
    by_plot = {plot: [one for one in found if (one.plot or "no plot") == plot] for plot in plots}
    return {
        plot: {"num_stories": len(ones), "num_accepted": sum(one.constraint is None for one in ones)}
        for plot, ones in by_plot.items()
    }


def distances_by_plot(held_out: Sequence[Diagnosis], distances: np.ndarray) -> dict[str, float]:
    """Return the mean distance from the entropy over the held-out stories of each plot."""
    plots = np.array([one.plot for one in held_out])
    return {str(plot): float(distances[plots == plot].mean()) for plot in sorted(set(plots.tolist()))}
