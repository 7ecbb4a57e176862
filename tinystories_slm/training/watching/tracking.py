"""The record of a run: metrics.jsonl, samples.md, loss.png and report.html, in optimizer steps and tokens."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from tinystories_slm.data.artifacts import finished_file
from tinystories_slm.training.watching.record import read_metrics, read_samples
from tinystories_slm.training.watching.report import write_report
from tinystories_slm.training.watching.trackers import Tracker

logger = logging.getLogger(__name__)


class RunRecord:
    """Appends to the record in `run_dir`; on a resumed run, what came after `step` is dropped first.

    With `written` off (every process but the first) the calls do nothing. `entropy`, in nats per
    token, is the line in the plot that no loss can honestly cross, where the corpus knows it. What
    goes to metrics.jsonl goes to `tracker` as well.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        step: int = 0,
        entropy: float | None = None,
        written: bool = True,
        tracker: Tracker | None = None,
    ) -> None:
        self._written = written
        self._entropy = entropy
        self._tracker = tracker
        self._run_dir = run_dir
        self.metrics_path = run_dir / "metrics.jsonl"
        self.samples_path = run_dir / "samples.md"
        self.plot_path = run_dir / "loss.png"
        if written:
            if tracker:
                tracker.catch_up(read_metrics(self.metrics_path), step=step)
            self._forget_after(step)

    def log(self, metrics: Mapping[str, float], *, step: int, tokens: int) -> None:
        """One line of metrics.jsonl."""
        if not self._written:
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "tokens": tokens, **metrics}) + "\n")
        if self._tracker:
            self._tracker.log({"tokens": tokens, **metrics}, step=step)

    def sample(self, story: str, *, step: int) -> None:
        """One story of samples.md."""
        if not self._written:
            return
        with self.samples_path.open("a", encoding="utf-8") as file:
            file.write(_section(step, story))

    def plot(self) -> None:
        """Make loss.png and report.html anew from the files of the run so far."""
        if not self._written:
            return
        try:
            self._draw_loss()
            write_report(self._run_dir)
        except OSError:
            raise  # a full disk or a folder that became read-only concerns what is saved, too
        except Exception:
            logger.exception("loss.png or report.html could not be drawn; the run goes on")

    def close(self) -> None:
        """The tracker has been told everything."""
        if self._tracker:
            self._tracker.close()

    def _draw_loss(self) -> None:
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
        with finished_file(self.metrics_path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        sections = [_section(at, story) for at, story in read_samples(self.samples_path) if at <= step]
        with finished_file(self.samples_path) as path:
            path.write_text("# Stories told during training\n\n" + "".join(sections), encoding="utf-8")


def _section(step: int, story: str) -> str:
    quoted = "\n".join(f"> {line}".rstrip() for line in story.splitlines())
    return f"## step {step}\n\n{quoted}\n\n"
