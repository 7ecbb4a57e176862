"""Likelihood of stories as a metric of the `evaluate` library."""

import datasets
import evaluate

from tinystories_slm.evaluation.likelihood import metrics_from_sums

_DESCRIPTION = """Loss, perplexity, bits per byte and accuracy of a causal language model on stories.
Each story adds its sums, and the metrics are computed once from the sums over all stories. No batch is
averaged, so the batch size does not matter."""


class StoryLikelihood(evaluate.Metric):
    """Metric with `add_batch(nats=, num_correct=, num_tokens=, num_bytes=)`, one value per story each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="Sums over the tokens of each story, and its UTF-8 bytes.",
            features=datasets.Features(
                nats=datasets.Value("float64"),
                num_correct=datasets.Value("int64"),
                num_tokens=datasets.Value("int64"),
                num_bytes=datasets.Value("int64"),
            ),
        )

    def _compute(self, nats, num_correct, num_tokens, num_bytes) -> dict[str, float]:
        return metrics_from_sums(
            nats=sum(nats),
            num_correct=sum(num_correct),
            num_tokens=sum(num_tokens),
            num_bytes=sum(num_bytes),
            num_stories=len(nats),
        )
