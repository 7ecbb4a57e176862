"""Write the records of a run: metrics.jsonl, samples.md, loss.png and report.html."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from tinystories_slm.io.atomic import atomic_write, write_text
from tinystories_slm.runs.figures import Figure, FigureCanvasAgg, LogLocator, NullLocator
from tinystories_slm.runs.records import dropped_metrics
from tinystories_slm.runs.report import write_report
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.runs.trackers import Tracker

logger = logging.getLogger(__name__)


class RunRecorder:
    """Append metrics and samples to the files of a run directory.

    A resumed run first deletes the records after `step`. With `enabled` false, as on every process
    but the main one, no method writes anything.

    Args:
        run_dir: Run directory.
        step: Optimizer steps done before this session.
        entropy: Lower bound of the loss in nats per token, a dashed line in the plot; None if unknown.
        enabled: Whether this process writes.
        tracker: Receives every line of metrics.jsonl as well.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        step: int = 0,
        entropy: float | None = None,
        enabled: bool = True,
        tracker: Tracker | None = None,
    ) -> None:
        self.run_dir = RunDir(run_dir)
        self._enabled = enabled
        self._entropy = entropy
        self._tracker = tracker
        if enabled:
            if tracker:
                tracker.backfill(self.run_dir.read_metrics(), step=step)
            self._truncate_after(step)

    def log(self, metrics: Mapping[str, float], *, step: int, tokens: int) -> None:
        """Append a line to metrics.jsonl and log it to the tracker."""
        if not self._enabled:
            return
        with self.run_dir.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "tokens": tokens, **metrics}) + "\n")
        if self._tracker:
            self._tracker.log({"tokens": tokens, **metrics}, step=step)

    def log_sample(self, story: str, *, step: int) -> None:
        """Append a story to samples.md."""
        if not self._enabled:
            return
        with self.run_dir.samples.open("a", encoding="utf-8") as file:
            file.write(_format_sample(step, story))

    def plot(self) -> None:
        """Write loss.png and report.html from the records so far."""
        if not self._enabled:
            return
        try:
            self._plot_loss()
            write_report(self.run_dir.path)
        except OSError:
            raise  # a full disk or a read-only directory affects checkpoints, too
        except Exception:
            logger.exception("loss.png or report.html could not be written; training continues")

    def close(self) -> None:
        """Close the tracker."""
        if self._tracker:
            self._tracker.close()

    def _plot_loss(self) -> None:
        lines = self.run_dir.read_metrics()
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, label, style in (("train/loss", "training", "-"), ("val/loss", "validation", "o-")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        for number, one in enumerate(self.run_dir.read_extensions()):
            points = [
                (line["step"], line["train/loss"]) for line in dropped_metrics(one) if "train/loss" in line
            ]
            if points:
                axes.plot(*zip(*points, strict=True), ":", color="tab:blue", linewidth=1.2)
            axes.axvline(
                one["from_step"], linestyle=":", color="gray", label=None if number else "extended here"
            )
        if self._entropy is not None:
            axes.axhline(self._entropy, linestyle="--", color="black", label="corpus entropy")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(self.run_dir.loss_plot) as path:
            figure.savefig(path, format="png", dpi=120)

    def _truncate_after(self, step: int) -> None:
        kept = [line for line in self.run_dir.read_metrics() if line["step"] <= step]
        write_text(self.run_dir.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        samples = [_format_sample(at, story) for at, story in self.run_dir.read_samples() if at <= step]
        write_text(self.run_dir.samples, "# Stories generated during training\n\n" + "".join(samples))


def _format_sample(step: int, story: str) -> str:
    quoted = "\n".join(f"> {line}".rstrip() for line in story.split("\n"))
    return f"## step {step}\n\n{quoted}\n\n"
