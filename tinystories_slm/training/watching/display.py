"""What a run shows: the arithmetic at its start, then a bar on a terminal, elsewhere a line now and then."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from accelerate import Accelerator
from tqdm import tqdm

from tinystories_slm.config import RunConfig
from tinystories_slm.data.prepare import Manifest
from tinystories_slm.model import TinyStoriesConfig
from tinystories_slm.training.schedule import REFERENCE_TOKENS, REFERENCE_WIDTH, peak_lr
from tinystories_slm.training.settings import Settings
from tinystories_slm.training.watching.estimate import (
    Peak,
    disk_bytes,
    flops_per_token,
    memory_bytes,
    num_embedding_parameters,
    num_parameters,
)

logger = logging.getLogger(__name__)

# Off a terminal a line at least this many seconds after the one before, and later in a run a longer
# time after it, so that the log of a night is not a thousand times that of a minute.
_SECONDS_BETWEEN_LINES = 5.0
_SHARE_BETWEEN_LINES = 0.02
# Steps after which the time that a run takes can be told.
_STEPS_TO_KNOW = 20


def announce(
    config: RunConfig,
    accelerator: Accelerator,
    settings: Settings,
    model_config: TinyStoriesConfig,
    manifest: Manifest,
    peak: Peak,
    *,
    step: int,
) -> None:
    """The arithmetic that a reader would do by hand; the time is told once some steps have been taken."""
    args = config.train
    num = num_parameters(model_config)
    num_embedding = num_embedding_parameters(model_config)
    tokens_per_step = args.batch_size * config.data.seq_len
    total_tokens = args.max_steps * tokens_per_step
    train_tokens = manifest.splits["train"]["num_tokens"]
    logger.info(
        "model: %s parameters (%s without embeddings), %s family, vocabulary %s",
        f"{num:,}", f"{num - num_embedding:,}", model_config.family, f"{model_config.vocab_size:,}",
    )  # fmt: skip
    logger.info(
        "run: %d steps of %d x %d = %s tokens, %s in all, %.1f epochs of the %s training tokens",
        args.max_steps, args.batch_size, config.data.seq_len, f"{tokens_per_step:,}",
        f"{total_tokens:,}", total_tokens / train_tokens, f"{train_tokens:,}",
    )  # fmt: skip
    lr = peak_lr(args, hidden_size=model_config.hidden_size, tokens_per_step=tokens_per_step)
    scaled = f", {args.lr:g} scaled from {REFERENCE_WIDTH} wide, {REFERENCE_TOKENS:,} tokens a step"
    logger.info(
        "learning rate: %.3g at its peak%s; %s, %s to %.3g",
        lr, scaled if args.lr_scaling else "", args.optimizer, args.schedule, lr * args.min_lr_rate,
    )  # fmt: skip
    logger.info(
        "on: %d process%s, %s, mixed precision %s, %d micro-batch%s a step%s",
        accelerator.num_processes, "" if accelerator.num_processes == 1 else "es", accelerator.device,
        accelerator.mixed_precision, accelerator.gradient_accumulation_steps,
        "" if accelerator.gradient_accumulation_steps == 1 else "es",
        f"; resumed at step {step}" if step else "",
    )  # fmt: skip
    logger.info("with: %s", settings.told())
    memory = memory_bytes(
        model_config,
        per_device_batch_size=settings.per_device_batch_size,
        seq_len=config.data.seq_len,
        precision=accelerator.mixed_precision,
        optimizer=args.optimizer,
        averaged=args.ema_decay is not None,
        device_type=accelerator.device.type,
        attention=settings.attention,
        fused=settings.fused,
    )
    disk = disk_bytes(
        model_config,
        optimizer=args.optimizer,
        averaged=args.ema_decay is not None,
        keep_checkpoints=args.keep_checkpoints,
    )
    logger.info(
        "needs: about %s of memory a process (%s of them logits) beside torch's own, %s of disk",
        in_bytes(memory.total), in_bytes(memory.logits), in_bytes(disk.run_folder),
    )  # fmt: skip
    per_token = flops_per_token(model_config, config.data.seq_len)
    at_peak_s = (total_tokens - step * tokens_per_step) * per_token
    at_peak_s /= peak.flops_per_second * accelerator.num_processes
    logger.info(
        "peak: %s a process (%s); at it, %s FLOP a token take %s in all; the real time after %d steps",
        in_flops(peak.flops_per_second), peak.source, f"{per_token:,.0f}", in_time(at_peak_s), _STEPS_TO_KNOW,
    )  # fmt: skip


class Display:
    """Progress of the steps `first_step` to `max_steps`; silent unless `shown`."""

    def __init__(self, max_steps: int, *, first_step: int, shown: bool):
        self._shown = shown
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            # 80 columns have room for it, with a bar of at least ten.
            bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}",
            disable=not (shown and self._on_terminal),
            dynamic_ncols=True,
        )
        self._first_step, self._max_steps = first_step, max_steps
        self._started_s = self._last_line_s = time.perf_counter()
        # The first line that is shown: everything before it had compiling and warming up in it.
        self._warm: tuple[int, float] | None = None
        self._foretold = False

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
        now_s = time.perf_counter()
        self._foretell(step, now_s)
        figures = f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
        if "train/mfu" in metrics:
            figures += f", MFU {100 * metrics['train/mfu']:.1f}%"
        self._bar.set_postfix_str(f"loss {metrics['train/loss']:.3f}, {figures}")
        if not self._on_terminal and (self._line_is_due(now_s) or step == self._max_steps):
            left_s = self._left_s(step, now_s)
            logger.info(
                "step %d/%d: loss %.3f, %s%s",
                step, self._max_steps, metrics["train/loss"], figures,
                "" if left_s is None else f", {in_time(left_s)} left",
            )  # fmt: skip
            self._last_line_s = now_s

    def close(self) -> None:
        self._bar.close()

    def _foretell(self, step: int, now_s: float) -> None:
        """Say once how long it takes from here: at the start nobody can know."""
        if self._warm is None:
            self._warm = (step, now_s)
        elif not self._foretold and step - self._first_step >= _STEPS_TO_KNOW:
            self._foretold = True
            if (left_s := self._left_s(step, now_s)) is not None:
                pace = step - self._warm[0]
                logger.info(
                    "time: about %s from here, by the pace of the last %d steps", in_time(left_s), pace
                )

    def _left_s(self, step: int, now_s: float) -> float | None:
        """By the pace since the first line; None at it, where the pace is not known, and at the end."""
        since_step, since_s = self._warm or (step, now_s)
        if step == since_step or step == self._max_steps:
            return None
        return (self._max_steps - step) * (now_s - since_s) / (step - since_step)

    def _line_is_due(self, now_s: float) -> bool:
        pause_s = max(_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN_LINES * (now_s - self._started_s))
        return now_s - self._last_line_s > pause_s


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


def in_bytes(number: float) -> str:
    """`12 MB`, `3.4 GB`: in powers of ten, as disks and data sheets count."""
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1e3, "kB"), (1e6, "MB")) if number < 999.5 * scale), (1e9, "GB")
    )
    number /= scale
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"


def in_flops(number: float) -> str:
    """`450 GFLOP/s`, `312 TFLOP/s`."""
    scale, unit = (1e12, "TFLOP/s") if number >= 0.9995e12 else (1e9, "GFLOP/s")
    return f"{number / scale:,.3g} {unit}" if number < 999.5 * scale else f"{number / scale:,.0f} {unit}"


def in_time(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 0.95 else "1 s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
