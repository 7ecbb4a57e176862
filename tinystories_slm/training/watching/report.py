"""report.html: one page that shows a run, from the files of its folder and nothing else."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from tinystories_slm.config import load_config
from tinystories_slm.data.prepare import Manifest
from tinystories_slm.errors import InputError
from tinystories_slm.training.watching.chart import Curve, chart
from tinystories_slm.training.watching.estimate import num_parameters
from tinystories_slm.training.watching.record import entropy_per_token, read_metrics, read_samples

# A run of a thousand evaluations tells the same story a thousand times.
_MAX_STORIES = 12

_EVALUATION = {
    "loss": "loss, nats per token",
    "entropy": "the corpus's own entropy, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "entropy_bits_per_byte": "the corpus's own entropy, bits per byte",
    "accuracy": "next tokens that are its first choice",
    "num_stories": "stories scored",
    "num_tokens": "tokens scored",
    "num_bytes": "bytes scored",
}


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Make the report of a run anew."""

    run: Path = Path("runs/quickstart")
    """Run folder, of a finished run or one that is going on; `report.html` is written into it."""


def report(args: ReportArgs) -> Path:
    """`write_report` for a command line.

    Raises:
        InputError: the folder is no run's.
    """
    if not (args.run / "config.yaml").is_file():
        raise InputError(f"run ({args.run}) is no run folder: there is no config.yaml; name one like runs/9m")
    path = write_report(args.run)
    print(path)
    return path


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder: the page is always whole, also for who reads it just now.

    Whatever the run has not come to yet, or did not record, is left out.
    """
    page = _template().render(**_contents(run_dir))
    path = run_dir / "report.html"
    partial = path.with_name("report.html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


@cache
def _template() -> Template:
    loader = PackageLoader("tinystories_slm.training.watching", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


def _contents(run_dir: Path) -> dict[str, Any]:
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    lines = read_metrics(run_dir / "metrics.jsonl")
    manifest = Manifest.load(run_dir / "manifest.json") if (run_dir / "manifest.json").exists() else None
    evaluation = _read_json(run_dir / "evaluation.json")
    entropy = entropy_per_token(manifest) if manifest else evaluation.get("entropy")
    step = max((line["step"] for line in lines), default=0)
    return {
        "name": run_dir.absolute().name,
        "step": step,
        "max_steps": max(config["train"]["max_steps"], step),
        "summary": _summary(run_dir, config, manifest),
        "tiles": _tiles(lines, entropy, evaluation),
        "entropy": entropy,
        "wide_loss": _loss_chart(lines, entropy, width=1060, height=330),
        "narrow_loss": _loss_chart(lines, entropy, width=400, height=290),
        "charts": _small_charts(lines),
        "stories": _spread(read_samples(run_dir / "samples.md")),
        "told": _told(run_dir / "stories.jsonl"),
        "evaluation": [
            (_EVALUATION.get(name, name.replace("_", " ")), _figure(name, value))
            for name, value in evaluation.items()
            if isinstance(value, (int, float, str)) and not isinstance(value, bool)
        ],
        "config": {
            section: {name: _plain(value) for name, value in values.items()}
            for section, values in config.items()
            if isinstance(values, Mapping)
        },
        "environment": _environment_rows(_read_json(run_dir / "environment.json")),
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _summary(run_dir: Path, config: dict[str, Any], manifest: Manifest | None) -> str:
    """What is trained, on what."""
    model, data = config["model"], config["data"]
    parts = [f"{model['num_hidden_layers']} layers x {model['hidden_size']}, {model['family']} family"]
    if manifest:
        try:
            architecture = load_config(run_dir / "config.yaml").model_config(vocab_size=manifest.vocab_size)
            parts.insert(0, f"{num_parameters(architecture):,} parameters")
        except InputError:
            pass  # written by another version of this program: the rest of the page still stands
        parts.append(f"vocabulary {manifest.vocab_size:,}")
    parts.append(f"trained on {_plain(data['source'])}")
    return ", ".join(parts)


def _tiles(
    lines: list[dict[str, Any]], entropy: float | None, evaluation: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """(name, figure, what to hold it against)."""
    tiles = []
    losses = [(line["val/loss"], line["step"]) for line in lines if "val/loss" in line]
    if losses:
        loss, step = min(losses)
        beside = f"the corpus's entropy: {entropy:.4f}" if entropy else f"perplexity {_exp(loss):.2f}"
        tiles.append(("best validation loss", f"{loss:.4f}", f"at step {step:,}; {beside}"))
    if "bits_per_byte" in evaluation:
        own = evaluation.get("entropy_bits_per_byte")
        beside = f"the corpus's entropy: {own:.4f}" if own else "compares across vocabularies"
        tiles.append(("bits per byte", f"{evaluation['bits_per_byte']:.4f}", beside))
    if lines:
        seconds = max((line.get("seconds", 0) for line in lines), default=0)
        taken = f"in {_duration(seconds)}" if seconds else "read so far"
        tiles.append(("training tokens", _short(lines[-1]["tokens"]), taken))
    if speeds := _values(lines, "train/tokens_per_second"):
        mfu = _values(lines, "train/mfu")
        beside = f"{100 * median(mfu):.0f}% of the device's peak" if mfu else "median of the run"
        tiles.append(("tokens per second", _short(median(speeds)), beside))
    return tiles


def _loss_chart(
    lines: list[dict[str, Any]], entropy: float | None, *, width: int, height: int
) -> Markup | None:
    curves = _curves(lines, ("train/loss", "training", False), ("val/loss", "validation", True))
    if not curves:
        return None
    return Markup(chart("loss", curves, width=width, height=height, log=True, level=entropy))


def _small_charts(lines: list[dict[str, Any]]) -> list[tuple[str, str, Markup]]:
    """(title, unit, svg) of what was recorded."""
    norms = [value for value in _values(lines, "train/grad_norm") if value > 0]
    spiky = bool(norms) and max(norms) > 20 * median(norms)
    wanted = [
        ("Learning rate", "", "train/lr", False, "{:.2g}".format),
        ("Gradient norm", "before clipping", "train/grad_norm", spiky, "{:g}".format),
        ("Throughput", "tokens per second", "train/tokens_per_second", False, _short),
        ("Utilisation", "share of the peak (MFU)", "train/mfu", False, "{:.0%}".format),
    ]
    charts = []
    for title, unit, name, log, tick in wanted:
        if curves := _curves(lines, (name, title.lower(), False)):
            charts.append((title, unit, Markup(chart(title, curves, log=log, tick=tick))))
    return charts


def _curves(lines: list[dict[str, Any]], *wanted: tuple[str, str, bool]) -> list[Curve]:
    curves = []
    for name, label, dots in wanted:
        points = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
        if points:
            curves.append(Curve(label, points, dots=dots and len(points) <= 60))
    return curves


def _values(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if math.isfinite(line.get(name, math.nan))]


def _spread(samples: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first, the last, and evenly spaced ones between."""
    if len(samples) <= _MAX_STORIES:
        return samples
    last = len(samples) - 1
    return [samples[round(i * last / (_MAX_STORIES - 1))] for i in range(_MAX_STORIES)]


def _told(path: Path) -> list[str]:
    """Stories of the finished model: with their prompt, as `generate` writes them."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line)["story"] for line in text.splitlines() if line][:3]


def _environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in environment.items():
        if name == "packages":
            rows += [(package, str(version)) for package, version in value.items()]
        elif name == "peak_flops_per_second":
            rows.append(("peak assumed", f"{value / 1e12:,.3g} TFLOP/s a process"))
        else:
            rows.append((name.replace("_", " "), _plain(value)))
    return rows


def _plain(value: Any) -> str:
    """As YAML has it; of a path on this machine the last part, as the page may be shown around."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and Path(value).is_absolute():
        return f".../{Path(value).name}"
    return str(value)


def _figure(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if name == "accuracy":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _short(number: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
