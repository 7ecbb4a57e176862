"""What a run shows while it goes: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Off a terminal (a log file, CI) a line at least this many seconds after the one before.
_SECONDS_BETWEEN_LINES = 5.0


class Display:
    """Progress of the steps `first_step` to `max_steps`; silent unless `shown`."""

    def __init__(self, max_steps: int, *, first_step: int, shown: bool):
        self._shown = shown
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            desc="train",
            unit="step",
            disable=not (shown and self._on_terminal),
        )
        self._first_step, self._max_steps = first_step, max_steps
        self._started_s = self._last_line_s = time.perf_counter()

    def advance(self) -> None:
        """One more optimizer step is done."""
        self._bar.update()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """The newest metrics; a validation loss always gets a line of its own."""
        if not self._shown:
            return
        if "val/loss" in metrics:
            logger.info(
                "step %d/%d: validation loss %.4f, perplexity %.2f",
                step, self._max_steps, metrics["val/loss"], metrics["val/perplexity"],
            )  # fmt: skip
            return
        loss, speed = metrics["train/loss"], metrics["train/tokens_per_second"]
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        now_s = time.perf_counter()
        if not self._on_terminal and (
            now_s - self._last_line_s > _SECONDS_BETWEEN_LINES or step == self._max_steps
        ):
            left_s = (self._max_steps - step) * (now_s - self._started_s) / max(1, step - self._first_step)
            logger.info(
                "step %d/%d: loss %.3f, %s tokens/s, %d:%02d left",
                step, self._max_steps, loss, f"{speed:,.0f}", left_s // 60, left_s % 60,
            )  # fmt: skip
            self._last_line_s = now_s

    def close(self) -> None:
        self._bar.close()


class Stopwatch:
    """Seconds since the last `restart`, without those spent in `paused` blocks."""

    def __init__(self) -> None:
        self.paused_s = 0.0
        """Seconds that the last `paused` block took."""
        self.restart()

    def restart(self) -> None:
        self._since_s = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._since_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused_s = time.perf_counter()
        yield
        self.paused_s = time.perf_counter() - paused_s
        self._since_s += self.paused_s
