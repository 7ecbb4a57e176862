"""A fitted law as text, as the record of law.json, and as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tinystories_slm.evaluation.plot import use_log_counts
from tinystories_slm.evaluation.table import markdown_row
from tinystories_slm.hardware.host import package_versions
from tinystories_slm.io.atomic import atomic_write
from tinystories_slm.io.file_errors import translate_write_errors
from tinystories_slm.planning.fit import HeldOutCheck, ScalingFit
from tinystories_slm.planning.law import REPETITION_EPOCHS

# Sizes within this ratio have one curve.
_SAME_SIZE = 1.25
_PUBLISHED = "Muennighoff et al., arXiv 2305.16264"


def describe_fit(name: str, fit: ScalingFit) -> str:
    """Return the law, the check on held-out runs, and the rest as lines of text."""
    lines = [f"{name}: {fit.law.describe()}."]
    lines += [
        f"The runs do not bound the exponent of {term}: the law holds among them alone; add runs."
        for term in fit.law.unbounded_terms
    ]
    lines += [f"No check: {fit.check_reason}."] if fit.check is None else _check_lines(fit.check)
    if fit.repetition is not None:
        lines.append(
            f"Repeated stories, {fit.num_repeated} runs: R* = {fit.repetition} epochs "
            f"({REPETITION_EPOCHS:g} in {_PUBLISHED})."
        )
    for vocab_size, ratios in fit.vocabularies.items():
        lines.append(
            f"Vocabulary {vocab_size:,}, {len(ratios)} runs: {statistics.fmean(ratios):.3f} times the loss "
            f"of {fit.runs[0].vocab_size:,}, at equal sizes and text."
        )
    return "\n".join(lines)


def _check_lines(check: HeldOutCheck) -> list[str]:
    largest = max(run.budget for run in check.fitted)
    head = ["parameters", "tokens", "budget / largest fitted", "predicted", "reached", "error"]
    lines = [f"Held out, predicted from the {len(check.fitted)} smaller runs:"]
    lines += [markdown_row(head), "|---" * len(head) + "|"]
    for one in check.runs:
        lines.append(
            markdown_row(
                [
                    f"{one.run.num_parameters:,}",
                    f"{one.run.num_tokens:,}",
                    f"{one.run.budget / largest:.2f}",
                    str(one.predicted),
                    f"{one.run.bits_per_byte:.4f}",
                    f"{one.error:+.1%}",
                ]
            )
        )
    return [*lines, f"Root mean square of the errors: {check.root_mean_square:.1%}."]


def law_record(fit: ScalingFit, sources: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """Return the law as it stands in law.json; `planning/law.py` reads it."""
    sizes, tokens = ([getattr(run, name) for run in fit.runs] for name in ("num_parameters", "num_tokens"))
    repetition = {"value": REPETITION_EPOCHS, "source": _PUBLISHED}
    if fit.repetition is not None:
        repetition = asdict(fit.repetition)
    return {
        **fit.law.record(),
        "vocab_size": fit.runs[0].vocab_size,
        "bytes_per_token": statistics.fmean(run.bytes_per_token for run in fit.runs),
        "parameters_range": [min(sizes), max(sizes)],
        "tokens_range": [min(tokens), max(tokens)],
        "repetition_epochs": repetition,
        "vocabularies": {str(size): statistics.fmean(own) for size, own in fit.vocabularies.items()},
        "check": _check_record(fit),
        "provenance": {
            "date": datetime.now(UTC).date().isoformat(),
            "command": command,
            "versions": package_versions(),
            "sources": list(sources),
            "runs": [[run.num_parameters, run.num_tokens, run.bits_per_byte] for run in fit.runs],
        },
    }


def _check_record(fit: ScalingFit) -> dict[str, Any]:
    if fit.check is None:
        return {"reason": fit.check_reason}
    return {
        "num_fitted": len(fit.check.fitted),
        "root_mean_square": fit.check.root_mean_square,
        "held_out": [
            {
                "num_parameters": one.run.num_parameters,
                "num_tokens": one.run.num_tokens,
                "predicted": asdict(one.predicted),
                "reached": one.run.bits_per_byte,
            }
            for one in fit.check.runs
        ],
    }


def plot_fits(fits: Mapping[str, ScalingFit], path: Path) -> None:
    """Write a PNG: loss over training tokens, one panel for each law and one curve for each size.

    Rings mark the runs that were held out of the check. The band is that of a new run.

    Raises:
        UserError: the file cannot be written.
    """
    from tinystories_slm.runs.figures import Figure

    figure = Figure(figsize=(7 * len(fits), 4.8), layout="constrained")
    for axes, (name, fit) in zip(figure.subplots(1, len(fits), squeeze=False)[0], fits.items(), strict=True):
        _draw(axes, name, fit)
    with translate_write_errors("plot", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            figure.savefig(partial, format="png", dpi=130)


def _draw(axes: Any, name: str, fit: ScalingFit) -> None:
    tokens = [run.num_tokens for run in fit.runs]
    curve = np.geomspace(min(tokens) / 1.5, 3 * max(tokens), 60)
    groups = _size_groups([run.num_parameters for run in fit.runs])
    for index, sizes in enumerate(groups):
        color = f"C{index % 10}"
        own = [run for run in fit.runs if run.num_parameters in sizes]
        size = float(np.exp(np.mean(np.log([run.num_parameters for run in own]))))
        found = [fit.law.predict(parameters=size, tokens=one) for one in curve]
        axes.plot(curve, [one.value for one in found], color=color, label=f"{size / 1e6:.2g} M parameters")
        axes.fill_between(
            curve,
            [one.low for one in found],
            [one.high for one in found],
            color=color,
            alpha=0.1,
            linewidth=0,
        )
        axes.plot([run.num_tokens for run in own], [run.bits_per_byte for run in own], "o", color=color)
    if fit.check is not None:
        held_out = [one.run for one in fit.check.runs]
        axes.plot(
            [run.num_tokens for run in held_out], [run.bits_per_byte for run in held_out], "o",
            markersize=11, markerfacecolor="none", color="black", label="held out in the check",
        )  # fmt: skip
    use_log_counts(axes, tokens)
    axes.set(title=name, xlabel="training tokens", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()


def _size_groups(sizes: Sequence[int]) -> list[set[int]]:
    """Return the sizes in groups: each begins with its smallest, and holds those up to `_SAME_SIZE` of it."""
    groups: list[set[int]] = []
    for size in sorted(set(sizes)):
        if groups and size <= _SAME_SIZE * min(groups[-1]):
            groups[-1].add(size)
        else:
            groups.append({size})
    return groups
