"""Console output during training: a progress bar on a terminal, otherwise a log line from time to time."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

from tinystories_slm.io.units import format_duration

logger = logging.getLogger(__name__)

# Without a terminal the next line follows after 5 seconds or 2 % of the run time, whichever is longer.
# The log of a night is then not a thousand times as long as that of a minute.
_MIN_LOG_INTERVAL_S = 5.0
_MIN_LOG_INTERVAL_FRACTION = 0.02
ETA_AFTER_STEPS = 20
"""Optimizer steps of a session before its ETA is logged."""


class ProgressDisplay:
    """Show the progress of the optimizer steps `first_step` to `max_steps`; silent unless `enabled`."""

    def __init__(self, max_steps: int, *, first_step: int, enabled: bool, end_s: float | None = None):
        """Take `end_s`, the `time.perf_counter()` of the time limit, if the run has one."""
        self._enabled = enabled
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            # Fits into 80 columns with a bar of at least ten.
            bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}",
            disable=not (enabled and self._on_terminal),
            dynamic_ncols=True,
        )
        self._first_step, self._max_steps, self._end_s = first_step, max_steps, end_s
        self._started_s = self._last_line_s = time.perf_counter()
        # (step, time) of the first logged metrics: the steps before include compilation and warm-up.
        self._eta_start: tuple[int, float] | None = None
        self._eta_logged = False

    def advance(self) -> None:
        """Count one more optimizer step."""
        self._bar.update()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the newest metrics; a validation loss is always logged on a separate line."""
        if not self._enabled:
            return
        if "val/loss" in metrics:
            logger.info(
                "step %d/%d: validation loss %.4f, perplexity %.2f",
                step, self._max_steps, metrics["val/loss"], metrics["val/perplexity"],
            )  # fmt: skip
            return
        now_s = time.perf_counter()
        self._log_eta(step, now_s)
        throughput = f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
        if "train/mfu" in metrics:
            throughput += f", MFU {100 * metrics['train/mfu']:.1f}%"
        self._bar.set_postfix_str(f"loss {metrics['train/loss']:.3f}, {throughput}")
        if not self._on_terminal and (self._is_line_due(now_s) or step == self._max_steps):
            eta_s = self._eta_s(step, now_s)
            logger.info(
                "step %d/%d: loss %.3f, %s%s",
                step, self._max_steps, metrics["train/loss"], throughput,
                "" if eta_s is None else f", {format_duration(eta_s)} left",
            )  # fmt: skip
            self._last_line_s = now_s

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def _log_eta(self, step: int, now_s: float) -> None:
        """Log the ETA once per session, after `ETA_AFTER_STEPS` steps."""
        if self._eta_start is None:
            self._eta_start = (step, now_s)
        elif not self._eta_logged and step - self._first_step >= ETA_AFTER_STEPS:
            self._eta_logged = True
            if (eta_s := self._eta_s(step, now_s)) is not None:
                logger.info(
                    "time: about %s left, from the throughput of the last %d steps",
                    format_duration(eta_s), step - self._eta_start[0],
                )  # fmt: skip

    def _eta_s(self, step: int, now_s: float) -> float | None:
        """Return the seconds left at the mean speed since the first logged metrics, or to the time limit.

        None at the first metrics, where the speed is unknown, and at the last step.
        """
        start_step, start_s = self._eta_start or (step, now_s)
        if step == start_step or step == self._max_steps:
            return None
        eta_s = (self._max_steps - step) * (now_s - start_s) / (step - start_step)
        return eta_s if self._end_s is None else min(eta_s, max(0.0, self._end_s - now_s))

    def _is_line_due(self, now_s: float) -> bool:
        interval_s = max(_MIN_LOG_INTERVAL_S, _MIN_LOG_INTERVAL_FRACTION * (now_s - self._started_s))
        return now_s - self._last_line_s > interval_s


class Stopwatch:
    """Seconds since the last `restart`, without the time in `paused` blocks."""

    def __init__(self) -> None:
        self.paused_s = 0.0
        """Duration of the last `paused` block."""
        self.is_paused = False
        """Whether a `paused` block runs."""
        self.restart()

    def restart(self) -> None:
        """Set the elapsed time to zero."""
        self._start_s = time.perf_counter()

    def elapsed_s(self) -> float:
        """Return the seconds since `restart`, without the paused time."""
        return time.perf_counter() - self._start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from `elapsed_s`."""
        pause_start_s = time.perf_counter()
        self.is_paused = True
        yield
        self.is_paused = False
        self.paused_s = time.perf_counter() - pause_start_s
        self._start_s += self.paused_s
