"""Write report.html: one page about a run, rendered from the files of its run directory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from markupsafe import Markup

from tinystories_slm.config.command_args.reports import ReportArgs
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import write_text
from tinystories_slm.io.file_errors import translate_write_errors
from tinystories_slm.io.units import format_duration
from tinystories_slm.model_costs import num_parameters
from tinystories_slm.runs.chart import Curve, render_chart
from tinystories_slm.runs.page import load_template
from tinystories_slm.runs.records import (
    describe_extension,
    dropped_metrics,
    entropy_per_token,
    validation_metrics,
)
from tinystories_slm.runs.run_dir import RunDir

# Stories shown: a run of a thousand evaluations has a thousand similar ones.
_MAX_SAMPLES = 12
_MAX_GENERATED = 3
_MAX_MARKERS = 60

_EVALUATION = {
    "loss": "loss, nats per token",
    "entropy": "corpus entropy, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "entropy_bits_per_byte": "corpus entropy, bits per byte",
    "accuracy": "next-token accuracy",
    "num_stories": "stories scored",
    "num_split_stories": "stories in the split",
    "num_source_stories": "stories read from the data",
    "num_training_stories": "scored stories that the model was trained on",
    "weights_sha256": "SHA-256 of the weights",
    "num_tokens": "tokens scored",
    "num_bytes": "bytes scored",
}


def report(args: ReportArgs) -> Path:
    """Write the report of `args.run` and print its path.

    Raises:
        UserError: `args.run` is not a run directory, or one of its files is damaged.
    """
    RunDir(args.run).check_files()
    if not RunDir(args.run).config.is_file():
        raise UserError(
            f"run ({args.run}) is not a run directory: config.yaml does not exist; use one such as runs/9m"
        )
    with translate_write_errors("run", args.run):
        path = write_report(args.run)
    print(path)
    return path


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory; the file is replaced atomically.

    The page omits everything that the run has not recorded yet.
    """
    files = RunDir(run_dir)
    write_text(files.report, load_template("report.html.jinja").render(**_page_contents(files)))
    return files.report


def is_report_current(run_dir: Path) -> bool:
    """Whether `report.html` is what `write_report` would write now."""
    files = RunDir(run_dir)
    page = load_template("report.html.jinja").render(**_page_contents(files))
    return files.report.is_file() and files.report.read_bytes() == page.encode("utf-8")


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of config.yaml.

    Raises:
        UserError: the file is damaged or lacks a section that the page shows.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); correct it") from error
    sections = [config.get(name) if isinstance(config, dict) else None for name in ("train", "model", "data")]
    if not all(isinstance(section, dict) for section in sections) or not isinstance(
        sections[0].get("max_steps"), int
    ):
        raise UserError(f"{path} must hold the options of a run; correct it")
    return config


def _page_contents(files: RunDir) -> dict[str, Any]:
    """Return the variables of the template."""
    # Plain YAML: a page about a run of another version also shows options that this one does not have.
    config = _read_config(files.config)
    lines = files.read_metrics()
    manifest = files.load_manifest()
    models = (files.best, files.last)
    evaluation = next(iter(files.records_of(models, [files.read_evaluation()])), {})
    extensions = files.read_extensions()
    # best/ may be from the end before an extension.
    dropped = [line for one in extensions for line in dropped_metrics(one)]
    best = validation_metrics([*dropped, *lines], files.read_best_step())
    entropy = entropy_per_token(manifest) if manifest else evaluation.get("entropy")
    step = max((line["step"] for line in lines), default=0)
    return {
        "name": files.path.absolute().name,
        "step": step,
        "max_steps": max(config["train"]["max_steps"], step),
        "summary": _summary(files, config, manifest),
        "tiles": _tiles(lines, best, entropy, evaluation),
        "entropy": entropy,
        "wide_loss": _loss_chart(lines, entropy, extensions, width=1060, height=330),
        "narrow_loss": _loss_chart(lines, entropy, extensions, width=400, height=290),
        "extensions": [describe_extension(one) for one in extensions],
        "charts": _small_charts(lines),
        "samples": _evenly_spaced(files.read_samples()),
        "generated": _read_generated(files),
        "evaluation": [
            (_EVALUATION.get(name, name.replace("_", " ")), _format_metric(name, value))
            for name, value in evaluation.items()
            if isinstance(value, (int, float, str)) and not isinstance(value, bool)
        ],
        "config": {
            section: {name: _format_option(value) for name, value in values.items()}
            for section, values in config.items()
            if isinstance(values, Mapping)
        },
        "environment": _environment_rows(files.read_environment()),
    }


def _summary(files: RunDir, config: dict[str, Any], manifest: Manifest | None) -> str:
    """Return a line about the model and its training data."""
    model, data = config["model"], config["data"]
    parts = [f"{model['num_hidden_layers']} layers x {model['hidden_size']}, {model['family']} family"]
    if manifest:
        try:
            if run_config := files.load_config():
                architecture = run_config.model_config(vocab_size=manifest.vocab_size)
                parts.insert(0, f"{num_parameters(architecture):,} parameters")
        except UserError:
            pass  # config.yaml of another version: the page omits the parameter count
        parts.append(f"vocabulary {manifest.vocab_size:,}")
    parts.append(f"trained on {_format_option(data['source'])}")
    return ", ".join(parts)


def _tiles(
    lines: list[dict[str, Any]],
    best: dict[str, Any] | None,
    entropy: float | None,
    evaluation: dict[str, Any],
) -> list[tuple[str, str, str]]:
    """Return (title, value, note) of the most important metrics."""
    tiles = []
    if best:
        loss, step = best["val/loss"], best["step"]
        note = f"corpus entropy {entropy:.4f}" if entropy else f"perplexity {_safe_exp(loss):.2f}"
        tiles.append(("best validation loss", f"{loss:.4f}", f"at step {step:,}; {note}"))
    if "bits_per_byte" in evaluation:
        entropy_bits = evaluation.get("entropy_bits_per_byte")
        note = f"corpus entropy {entropy_bits:.4f}" if entropy_bits else "comparable across vocabularies"
        tiles.append(("bits per byte", f"{evaluation['bits_per_byte']:.4f}", note))
    if lines and "tokens" in lines[-1]:
        seconds = max(line.get("seconds", 0) for line in lines)
        note = f"in {format_duration(seconds)}" if seconds else "so far"
        tiles.append(("training tokens", _format_count(lines[-1]["tokens"]), note))
    if speeds := _values(lines, "train/tokens_per_second"):
        mfu = _values(lines, "train/mfu")
        note = f"{100 * median(mfu):.0f}% of the device's peak" if mfu else "median of the run"
        tiles.append(("tokens per second", _format_count(median(speeds)), note))
    return tiles


def _loss_chart(
    lines: list[dict[str, Any]],
    entropy: float | None,
    extensions: list[dict[str, Any]],
    *,
    width: int,
    height: int,
) -> Markup | None:
    curves = _curves(lines, ("train/loss", "training", False), ("val/loss", "validation", True))
    if not curves:
        return None
    for one in extensions:
        curves += _curves(dropped_metrics(one), ("train/loss", "decay before the extension", False))
    marks = [one["from_step"] for one in extensions]
    chart = render_chart("loss", curves, width=width, height=height, log=True, level=entropy, marks=marks)
    return Markup(chart)


def _small_charts(lines: list[dict[str, Any]]) -> list[tuple[str, str, Markup]]:
    """Return (title, unit, svg) of each metric that was logged."""
    norms = [value for value in _values(lines, "train/grad_norm") if value > 0]
    has_spikes = bool(norms) and max(norms) > 20 * median(norms)
    metrics = [
        ("Learning rate", "", "train/lr", False, "{:.2g}".format),
        ("Gradient norm", "before clipping", "train/grad_norm", has_spikes, "{:g}".format),
        ("Throughput", "tokens per second", "train/tokens_per_second", False, _format_count),
        ("Utilization", "share of the peak (MFU)", "train/mfu", False, "{:.0%}".format),
    ]
    charts = []
    for title, unit, name, log, tick in metrics:
        if curves := _curves(lines, (name, title.lower(), False)):
            charts.append((title, unit, Markup(render_chart(title, curves, log=log, tick=tick))))
    return charts


def _curves(lines: list[dict[str, Any]], *metrics: tuple[str, str, bool]) -> list[Curve]:
    """Return a curve for each (metric, label, with markers) that has finite values."""
    curves = []
    for name, label, markers in metrics:
        points = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
        if points:
            curves.append(Curve(label, points, markers=markers and len(points) <= _MAX_MARKERS))
    return curves


def _values(lines: list[dict[str, Any]], name: str) -> list[float]:
    """Return the finite values of a metric."""
    return [line[name] for line in lines if math.isfinite(line.get(name, math.nan))]


def _evenly_spaced(samples: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return at most `_MAX_SAMPLES`: the first, the last and evenly spaced ones between them."""
    if len(samples) <= _MAX_SAMPLES:
        return samples
    last = len(samples) - 1
    return [samples[round(i * last / (_MAX_SAMPLES - 1))] for i in range(_MAX_SAMPLES)]


def _read_generated(files: RunDir) -> list[str]:
    """Return the first stories of the run's models in stories.jsonl, prompt included."""
    lines = files.records_of((files.best, files.last), files.read_stories())
    return [str(line["story"]) for line in lines if "story" in line][:_MAX_GENERATED]


def _environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in environment.items():
        if name == "packages":
            rows += [(package, str(version)) for package, version in value.items()]
        elif name == "peak_flops_per_second":
            rows.append(("assumed peak", f"{value / 1e12:,.3g} TFLOP/s per process"))
        elif name == "earlier_sessions":
            rows += [(f"from step {one.get('first_step', 1)}", str(one.get("hardware"))) for one in value]
        else:
            rows.append((name.replace("_", " "), _format_option(value)))
    return rows


def _format_option(value: Any) -> str:
    """Return `value` as in YAML, and only the last part of an absolute path: the page may be shared."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and Path(value).is_absolute():
        return f".../{Path(value).name}"
    return str(value)


def _format_metric(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return _format_option(value)
    if name == "accuracy":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _format_count(number: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def _safe_exp(loss: float) -> float:
    """Return e to the power of `loss`, limited to avoid an overflow."""
    return math.exp(min(loss, 700.0))
