"""Checks that run real training steps of the configured model: does it learn, and how long will it take?"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tinystories_slm.config import RunConfig
from tinystories_slm.doctor.diagnostic import Diagnostic
from tinystories_slm.doctor.machine import MALLOC_TUNABLES
from tinystories_slm.doctor.numerics import DTYPES, device_matmul_flops, synchronize
from tinystories_slm.doctor.resources import load_manifest, vocab_size
from tinystories_slm.io.units import format_duration
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_costs import flops_per_token
from tinystories_slm.training.builder import prepare_to_train
from tinystories_slm.training.optimizers import set_learning_rate
from tinystories_slm.training.runtime import resolve_per_device_batch_size, resolve_runtime
from tinystories_slm.training.schedule import peak_lr

try:
    import resource
except ImportError:  # Windows
    resource = None

OVERFIT_STEPS = 20
OVERFIT_BOUND = 0.5
"""After the overfit steps on one batch the loss must be below this share of the first loss."""

_OVERFIT_TOKENS = 32
_NUM_TIMED_STEPS = 4
_MAX_STEP_S = 5.0
_SLOW_RUN_S = 86_400  # one day
# Share of a step's time in kernel mode above which its page faults are worth a malloc setting.
_MAX_KERNEL_SHARE = 0.05
_MIN_PAGE_FAULTS = 1000


def check_learning(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Diagnostic]:
    """Train the model on one small batch for 20 steps with its optimizer; the loss must fall by half.

    The learning rate is 0.75 / hidden_size, at most 0.01, without warm-up, dropout or decay, whatever the
    configuration says: the check tests whether model, optimizer, precision and hardware learn at all.
    """
    lr = min(0.01, 0.75 / config.model.hidden_size)
    overfit_config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.0),
        train=dataclasses.replace(config.train, lr=lr, weight_decay=0.0, compile=False),
    )
    trial = TrialRun(overfit_config, device, run_precision, num_rows=1, seq_len=_OVERFIT_TOKENS)
    losses = [trial.step() for _ in range(OVERFIT_STEPS)]
    bound = OVERFIT_BOUND * losses[0]
    text = (
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {OVERFIT_STEPS} steps on one batch (bound {bound:.2f})"
    )
    if losses[-1] <= bound:  # False for NaN
        yield Diagnostic("learning", "ok", text)
    else:
        remedy = (
            'to find the cause: --train.mixed_precision "no", --train.optimizer adamw, '
            "--model.initializer_range 0.02; if none of them helps, `make test`"
        )
        yield Diagnostic("learning", "PROBLEM", text, remedy)


def check_duration(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Diagnostic]:
    """Estimate the time of the run on one process from timed steps at the configured micro-batch."""
    found, train = estimate_duration(config, device, run_precision), config.train
    tokens_per_second = train.batch_size * config.data.seq_len / found.step_s
    text = (
        f"about {format_duration(found.total_s)} on one process: {train.max_steps:,} steps of "
        f"{found.step_s:.3g} s ({tokens_per_second:,.0f} tokens/s)"
    )
    if found.evaluation_s:
        text += f", {found.num_evaluations} evaluations of {found.evaluation_s:.3g} s"
    if found.num_rows != resolve_per_device_batch_size(config, device, precision=run_precision):
        text += f"; timed with a micro-batch of {found.num_rows}"
    if train.max_minutes is not None and found.total_s > train.max_minutes * 60:
        yield Diagnostic("time", "ok", f"{text}; train.max_minutes ({train.max_minutes:g}) stops it earlier")
    elif found.total_s > _SLOW_RUN_S:
        remedy = "fewer --train.max_steps, a smaller preset, or more processes (docs/many_processes.md)"
        yield Diagnostic("time", "slow", text, remedy)
    else:
        yield Diagnostic("time", "ok", text)
    if device.type == "cpu" and resource is not None:
        yield from check_page_faults(found.timings)


def estimate_duration(config: RunConfig, device: torch.device, run_precision: str) -> "RunDuration":
    """Time some steps of the run at the configured micro-batch, and estimate the time of all of it."""
    num_rows = _timing_batch_size(config, device, run_precision)
    trial = TrialRun(config, device, run_precision, num_rows=num_rows, seq_len=config.data.seq_len)
    timings = [trial.timed_step() for _ in range(_NUM_TIMED_STEPS)][1:]  # the first step is a warm-up
    backward_s = statistics.median(timing.backward_s for timing in timings)
    update_s = statistics.median(timing.update_s for timing in timings)
    train = config.train
    return RunDuration(
        num_steps=train.max_steps,
        step_s=backward_s * train.batch_size / num_rows + update_s,
        num_evaluations=math.ceil(train.max_steps / train.eval_every),
        # A forward pass takes a third of forward and backward.
        evaluation_s=_validation_tokens(config) / (num_rows * config.data.seq_len) * backward_s / 3,
        num_rows=num_rows,
        timings=timings,
    )


@dataclass(frozen=True)
class RunDuration:
    """Estimated duration of a run on one process, without a time limit."""

    num_steps: int
    step_s: float
    num_evaluations: int
    evaluation_s: float
    """Seconds of one evaluation; 0 if the data are not prepared."""
    num_rows: int
    """Micro-batch of the timed steps."""
    timings: "list[StepTiming]"

    @property
    def total_s(self) -> float:
        """Seconds of all steps and evaluations."""
        return self.num_steps * self.step_s + self.num_evaluations * self.evaluation_s


@dataclass(frozen=True)
class StepTiming:
    """Measurements of one optimizer step."""

    backward_s: float
    """Seconds of forward and backward."""
    update_s: float
    """Seconds of gradient clipping and the optimizer."""
    kernel_s: float
    """CPU seconds of the whole step in kernel mode, summed over all threads; 0 on Windows."""
    page_faults: int
    """Page faults of the whole step; 0 on Windows."""


def check_page_faults(timings: list[StepTiming]) -> Iterator[Diagnostic]:
    """Check the page faults of each step, which are many if malloc returns memory to the system."""
    kernel_s = statistics.median(timing.kernel_s for timing in timings)
    faults = statistics.median(timing.page_faults for timing in timings)
    share = kernel_s / statistics.median(timing.backward_s + timing.update_s for timing in timings)
    text = f"{faults:,.0f} page faults per step, {share:.0%} of its time in the kernel"
    if share > _MAX_KERNEL_SHARE and faults > _MIN_PAGE_FAULTS:
        yield Diagnostic("page faults", "slow", text, MALLOC_TUNABLES)
    else:
        yield Diagnostic("page faults", "ok", text)


class TrialRun:
    """The model and optimizers of a run, as `train` sets them up, and one batch of random tokens."""

    def __init__(
        self, config: RunConfig, device: torch.device, run_precision: str, *, num_rows: int, seq_len: int
    ):
        torch.manual_seed(config.train.seed)
        self.device, self.precision, self.train_args = device, run_precision, config.train
        num_ids = vocab_size(config)
        self.model = TinyStoriesForCausalLM(config.model_config(vocab_size=num_ids)).to(device).train()
        resolved = dataclasses.replace(
            config, train=dataclasses.replace(config.train, mixed_precision=run_precision)
        )
        _, self.optimizers = prepare_to_train(self.model, config.train, resolve_runtime(resolved, device))
        tokens_per_step = config.train.batch_size * config.data.seq_len
        width = config.model.hidden_size
        set_learning_rate(
            self.optimizers, peak_lr(config.train, hidden_size=width, tokens_per_step=tokens_per_step)
        )
        shape = (num_rows, min(seq_len, config.data.seq_len))
        self.ids = torch.randint(num_ids, shape, device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run_precision == "fp16")

    def step(self) -> float:
        """Run one optimizer step and return its loss."""
        loss = self._backward()
        self._update()
        return loss.item()

    def timed_step(self) -> StepTiming:
        """Run one optimizer step and return its timing."""
        (kernel_before_s, faults_before), start_s = _kernel_usage(), time.perf_counter()
        self._backward()
        synchronize(self.device)
        backward_end_s = time.perf_counter()
        self._update()
        synchronize(self.device)
        end_s, (kernel_after_s, faults_after) = time.perf_counter(), _kernel_usage()
        return StepTiming(
            backward_s=backward_end_s - start_s,
            update_s=end_s - backward_end_s,
            kernel_s=kernel_after_s - kernel_before_s,
            page_faults=faults_after - faults_before,
        )

    def _backward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "no"):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, loss_only=True).loss
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _update(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train_args.max_grad_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()


def _kernel_usage() -> tuple[float, int]:
    """Return the CPU seconds in kernel mode and the page faults of this process so far."""
    if resource is None:
        return 0.0, 0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_stime, usage.ru_minflt


def _timing_batch_size(config: RunConfig, device: torch.device, run_precision: str) -> int:
    """Return the micro-batch, halved until a step is expected to take at most 5 seconds."""
    num_rows = resolve_per_device_batch_size(config, device, precision=run_precision)
    model = config.model_config(vocab_size=vocab_size(config))
    row_flops = flops_per_token(model, config.data.seq_len) * config.data.seq_len
    # A model reaches a third of the matmul FLOP/s.
    max_flops = _MAX_STEP_S * device_matmul_flops(device, DTYPES[run_precision]) / 3
    while num_rows > 1 and num_rows * row_flops > max_flops:
        num_rows //= 2
    return num_rows


def _validation_tokens(config: RunConfig) -> float:
    """Return the number of tokens that an evaluation scores; 0 if the data are not prepared."""
    manifest = load_manifest(config)
    if manifest is None:
        return 0.0
    split = manifest.splits["validation"]
    num_stories = min(config.train.eval_stories or split["num_stories"], split["num_stories"])
    return split["num_tokens"] * num_stories / split["num_stories"]
