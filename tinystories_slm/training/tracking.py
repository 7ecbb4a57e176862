"""The record of a run: metrics.jsonl, loss.png and samples.md, in optimizer steps and tokens."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator


class RunRecord:
    """Appends to the record in `run_dir`; on a resumed run, what came after `step` is dropped first.

    With `written` off (every process but the first) the calls do nothing. `entropy`, in nats per
    token, is the line in the plot that no loss can honestly cross, where the corpus knows it.
    """

    def __init__(
        self, run_dir: Path, *, step: int = 0, entropy: float | None = None, written: bool = True
    ) -> None:
        self._written = written
        self._entropy = entropy
        self.metrics_path = run_dir / "metrics.jsonl"
        self.samples_path = run_dir / "samples.md"
        self.plot_path = run_dir / "loss.png"
        if written:
            self._forget_after(step)

    def log(self, metrics: Mapping[str, float], *, step: int, tokens: int) -> None:
        """One line of metrics.jsonl."""
        if not self._written:
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "tokens": tokens, **metrics}) + "\n")

    def sample(self, story: str, *, step: int) -> None:
        """One story of samples.md."""
        if not self._written:
            return
        with self.samples_path.open("a", encoding="utf-8") as file:
            quoted = "\n".join(f"> {line}".rstrip() for line in story.splitlines())
            file.write(f"## step {step}\n\n{quoted}\n\n")

    def plot(self) -> None:
        """Redraw loss.png from metrics.jsonl: training and validation loss over steps."""
        if not self._written:
            return
        lines = read_metrics(self.metrics_path)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, label, style in (("train/loss", "training", "-"), ("val/loss", "validation", "o-")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        if self._entropy is not None:
            axes.axhline(self._entropy, linestyle="--", color="black", label="the corpus's entropy")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.plot_path, dpi=120)

    def _forget_after(self, step: int) -> None:
        kept = [line for line in read_metrics(self.metrics_path) if line["step"] <= step]
        self.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        samples = self.samples_path.read_text(encoding="utf-8") if self.samples_path.exists() else ""
        sections = re.split(r"^(?=## step \d+$)", samples, flags=re.MULTILINE)[1:]
        kept_sections = [s for s in sections if int(s.split(maxsplit=3)[2]) <= step]
        self.samples_path.write_text(
            "# Stories told during training\n\n" + "".join(kept_sections), encoding="utf-8"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
