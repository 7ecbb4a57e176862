"""Real steps of the configured model: does it learn, and how long will the run take?"""

import dataclasses
import math
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tinystories_slm.config import RunConfig
from tinystories_slm.doctor.arithmetic import DTYPES, matmul_flops, wait_for
from tinystories_slm.doctor.finding import Finding
from tinystories_slm.doctor.machine import ONE_HEAP
from tinystories_slm.doctor.needs import manifest_of, vocab_size
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.optim import build_optimizers
from tinystories_slm.training.settings import resolve_per_device_batch_size, resolve_settings
from tinystories_slm.training.watching.estimate import flops_per_token

OVERFIT_STEPS = 20
OVERFIT_BOUND = 0.5
"""After the overfit check's steps on one batch the loss has to be below this share of the first one."""

_OVERFIT_TOKENS = 32
_TIMED_STEPS = 4
_LONGEST_STEP_S = 5.0
_A_DAY_S = 86_400
# Of a step's time spent in the kernel, from which on its page faults are worth a setting.
_KERNEL_SHARE = 0.05


def overfit(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Finding]:
    """Twenty steps of the run's own model and optimizer on one small batch: the loss has to fall by half.

    The learning rate is 0.75 / hidden_size, at most 0.01, without warm-up, dropout or decay, whatever the
    run's own settings: this is about whether model, optimizer, number type and hardware learn at all.
    """
    lr = min(0.01, 0.75 / config.model.hidden_size)
    calm = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.0),
        train=dataclasses.replace(config.train, lr=lr, weight_decay=0.0, compile=False),
    )
    trainee = Trainee(calm, device, run_precision, rows=1, seq_len=_OVERFIT_TOKENS)
    losses = [trainee.step() for _ in range(OVERFIT_STEPS)]
    bound = OVERFIT_BOUND * losses[0]
    said = (
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {OVERFIT_STEPS} steps on one batch (bound {bound:.2f})"
    )
    if losses[-1] <= bound:  # not so for nan
        yield Finding("learning", "ok", said)
    else:
        remedy = (
            'to see which it is: --train.mixed_precision "no", --train.optimizer adamw, '
            "--model.initializer_range 0.02; `make test` if it is none"
        )
        yield Finding("learning", "PROBLEM", said, remedy)


def duration(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Finding]:
    """Timed steps at the configured micro-batch, times all that the run does, on this one process."""
    rows = _rows_to_time(config, device, run_precision)
    trainee = Trainee(config, device, run_precision, rows=rows, seq_len=config.data.seq_len)
    times = [trainee.timed_step() for _ in range(_TIMED_STEPS)][1:]  # the first one sets up
    rows_s = statistics.median(timed.rows_s for timed in times)
    update_s = statistics.median(timed.update_s for timed in times)

    step_s = rows_s * config.train.batch_size / rows + update_s
    evaluation_s = _validation_tokens(config) / (rows * config.data.seq_len) * rows_s / 3  # forward only
    num_evaluations = math.ceil(config.train.max_steps / config.train.eval_every)
    total_s = config.train.max_steps * step_s + num_evaluations * evaluation_s
    speed = config.train.batch_size * config.data.seq_len / step_s
    said = (
        f"about {spelled(total_s)} on one process: {config.train.max_steps:,} steps of {step_s:.3g} s "
        f"({speed:,.0f} tokens/s)"
    )
    said += f", {num_evaluations} evaluations of {evaluation_s:.3g} s" if evaluation_s else ""
    said += (
        ""
        if rows == resolve_per_device_batch_size(config, device, precision=run_precision)
        else f"; timed at {rows} sequences at once"
    )
    if config.train.max_minutes is not None and total_s > config.train.max_minutes * 60:
        yield Finding(
            "time", "ok", f"{said}; train.max_minutes ({config.train.max_minutes:g}) ends it before"
        )
    elif total_s > _A_DAY_S:
        remedy = "fewer --train.max_steps, a smaller preset, or more processes (docs/many_processes.md)"
        yield Finding("time", "slow", said, remedy)
    else:
        yield Finding("time", "ok", said)
    if device.type == "cpu":
        yield from paging(times)


@dataclass(frozen=True)
class Timed:
    """One timed step."""

    rows_s: float
    """Of forward and backward."""
    update_s: float
    """Of clipping and the optimizer."""
    kernel_s: float
    """Of both, on all threads, inside the kernel."""
    page_faults: int


def paging(times: list[Timed]) -> Iterator[Finding]:
    """Memory that is given back and fetched again at each step shows as page faults."""
    kernel_s = statistics.median(timed.kernel_s for timed in times)
    faults = statistics.median(timed.page_faults for timed in times)
    share = kernel_s / statistics.median(timed.rows_s + timed.update_s for timed in times)
    said = f"{faults:,.0f} page faults a step, {share:.0%} of its time in the kernel"
    if share > _KERNEL_SHARE and faults > 1000:
        yield Finding("page faults", "slow", said, ONE_HEAP)
    else:
        yield Finding("page faults", "ok", said)


class Trainee:
    """The configured model and optimizers before one batch of random tokens."""

    def __init__(
        self, config: RunConfig, device: torch.device, run_precision: str, *, rows: int, seq_len: int
    ):
        torch.manual_seed(config.train.seed)
        self.device, self.precision, self.train = device, run_precision, config.train
        num_ids = vocab_size(config)
        self.model = TinyStoriesForCausalLM(config.model_config(vocab_size=num_ids)).to(device).train()
        settings = resolve_settings(config, device)
        self.model.set_attn_implementation(settings.attention)
        if settings.compiled:
            for layer in self.model.model.layers:
                layer.compile()
        self.optimizers = build_optimizers(self.model, config.train)
        self.ids = torch.randint(num_ids, (rows, min(seq_len, config.data.seq_len)), device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run_precision == "fp16")

    def step(self) -> float:
        """One optimizer step; its loss."""
        loss = self._backward()
        self._update()
        return loss.item()

    def timed_step(self) -> Timed:
        """One optimizer step and where its time went."""
        used, began_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self._backward()
        wait_for(self.device)
        half_s = time.perf_counter()
        self._update()
        wait_for(self.device)
        ended_s, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        return Timed(
            rows_s=half_s - began_s,
            update_s=ended_s - half_s,
            kernel_s=after.ru_stime - used.ru_stime,
            page_faults=after.ru_minflt - used.ru_minflt,
        )

    def _backward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "no"):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, loss_only=True).loss
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _update(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()


def _rows_to_time(config: RunConfig, device: torch.device, run_precision: str) -> int:
    """The micro-batch, or as much of it as keeps a step within seconds here."""
    rows = resolve_per_device_batch_size(config, device, precision=run_precision)
    model = config.model_config(vocab_size=vocab_size(config))
    row_flops = flops_per_token(model, config.data.seq_len) * config.data.seq_len
    most = _LONGEST_STEP_S * matmul_flops(device, DTYPES[run_precision]) / 3  # a model reaches a third
    while rows > 1 and rows * row_flops > most:
        rows //= 2
    return rows


def _validation_tokens(config: RunConfig) -> float:
    """Tokens that an evaluation scores; 0 while the data are not prepared."""
    manifest = manifest_of(config)
    if manifest is None:
        return 0.0
    split = manifest.splits["validation"]
    stories = min(config.train.eval_stories or split["num_stories"], split["num_stories"])
    return split["num_tokens"] * stories / split["num_stories"]


def spelled(seconds: float) -> str:
    """`12 s`, `5 min 10 s`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / _A_DAY_S
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    if days < 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} d {int(hours % 24)} h"
