"""Power law of a sweep: one for each variant, over the parameters without embeddings and the tokens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinystories_slm.power_law import SYMBOLS, PowerLaw, UndeterminedLawError, fit_power_law
from tinystories_slm.sweeps.grid import VARIANT
from tinystories_slm.sweeps.results import SweepRow

FITTED_METRICS = ("bits_per_byte", "text_bits_per_byte", "loss")


@dataclass(frozen=True)
class SweepLaw:
    """The law of the runs of one variant, or why there is none."""

    variant: str | None
    """Label; None in a sweep without variants."""
    rows: Sequence[SweepRow]
    """Finished runs."""
    law: PowerLaw | None
    reason: str | None
    """Why the runs do not determine a law; None if they do."""


def fit_sweep(rows: Sequence[SweepRow], metric: str) -> list[SweepLaw]:
    """Return the law of each variant; empty if the metric is no loss, or size and tokens do not vary."""
    if metric not in FITTED_METRICS:
        return []
    groups: dict[str | None, list[SweepRow]] = {}
    for row in rows:
        if row.metrics and metric in row.metrics and not row.is_twin:
            groups.setdefault(row.labels.get(VARIANT), []).append(row)
    laws = [_fit(variant, own, metric) for variant, own in groups.items()]
    sizes = [{(row.num_non_embedding_parameters, row.steps) for row in one.rows} for one in laws]
    return laws if any(len(own) > 1 for own in sizes) else []


def _fit(variant: str | None, rows: Sequence[SweepRow], metric: str) -> SweepLaw:
    try:
        law = fit_power_law(
            [row.num_non_embedding_parameters for row in rows],
            [row.tokens for row in rows],
            [row.metrics[metric].value for row in rows],
        )
    except UndeterminedLawError as error:
        return SweepLaw(variant, rows, None, str(error))
    return SweepLaw(variant, rows, law, None)


def describe_law(one: SweepLaw, metric: str) -> str:
    """Return the law as a line of text, or why there is none."""
    name = metric.replace("_", " ") + (f" of {one.variant}" if one.variant else "")
    if one.law is None:
        return f"No power law of {name}: {one.reason}."
    largest = _double_size(one)
    inputs = ", ".join(f"{SYMBOLS[term][1]} = {value:,.0f}" for term, value in largest.items())
    return (
        f"Power law of {name}: {one.law.describe()}. Predicted for a new run with {inputs}: "
        f"{one.law.predict(**largest)}."
    )


def law_record(one: SweepLaw) -> dict[str, Any]:
    """Return the law as JSON types."""
    record: dict[str, Any] = {"variant": one.variant, "num_runs": len(one.rows), "reason": one.reason}
    if (law := one.law) is not None:
        largest = _double_size(one)
        record |= law.record() | {"prediction": {**largest, **asdict(law.predict(**largest))}}
    return record


def _double_size(one: SweepLaw) -> dict[str, float]:
    """Return twice the largest size, and the largest number of tokens, of those on which the law depends."""
    values = {
        "parameters": 2.0 * max(row.num_non_embedding_parameters for row in one.rows),
        "tokens": float(max(row.tokens for row in one.rows)),
    }
    return {term: values[term] for term in one.law.terms}
