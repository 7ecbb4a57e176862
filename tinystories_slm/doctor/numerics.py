"""Checks of precision, attention backends and torch.compile: are they correct here, and how fast?"""

import math
import time
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import flex_attention

from tinystories_slm.config import RunConfig
from tinystories_slm.doctor.diagnostic import Diagnostic, describe_error
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.peak import measure_matmul_flops
from tinystories_slm.kernels.attention import MATMUL
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.training.device_check import compare_with_cpu
from tinystories_slm.training.precision import resolve_precision
from tinystories_slm.training.runtime import resolve_attention, resolve_compile

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PRECISION_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_ATTENTION_BACKENDS = ("eager", MATMUL, "sdpa", "flex_attention", "flash_attention_2")
# Largest relative error of a gradient against fp32 eager: a few times the error of a correct backend.
_MAX_ERROR = {"no": 1e-4, "bf16": 0.1, "fp16": 0.02}
_VOCAB_SIZE, _NUM_TOKENS = 512, 64
_NUM_COMPILED_STEPS = 4
_CPU_MATMUL_SIZE, _ACCELERATOR_MATMUL_SIZE, _MATMUL_S = 768, 8192, 0.3


def precision_or_fallback(config: RunConfig, device: torch.device) -> str:
    """Return the precision of the run; `no` if it is invalid, which `check_precision` reports."""
    try:
        return resolve_precision(config.train.mixed_precision, device)
    except UserError:
        return "no"


def check_precision(config: RunConfig, device: torch.device) -> Iterator[Diagnostic]:
    """Check that the precision of the run works and is the faster one on this hardware."""
    configured = config.train.mixed_precision
    try:
        resolved = resolve_precision(configured, device)
    except UserError as error:
        yield Diagnostic("precision", "PROBLEM", str(error), "--train.mixed_precision auto")
        return
    speeds = {name: device_matmul_flops(device, DTYPES[name]) for name in ("no", "bf16")}
    ratio = speeds["bf16"] / speeds["no"]
    text = (
        f"{_PRECISION_NAMES[resolved]} (train.mixed_precision {configured}); matmuls reach "
        f"{speeds['no'] / 1e9:,.0f} GFLOP/s in fp32, {speeds['bf16'] / 1e9:,.0f} in bf16"
    )
    # The gap between 0.67 and 1.5 covers the noise of a busy machine.
    if resolved == "no" and ratio > 1.5:
        yield Diagnostic("precision", "slow", text, "--train.mixed_precision bf16")
    elif resolved == "bf16" and ratio < 0.67:
        yield Diagnostic("precision", "slow", text, '--train.mixed_precision "no"')
    else:
        yield Diagnostic("precision", "ok", text)


def device_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the matmul FLOP/s of `device`; on a CPU, those of one thread times the number of threads."""
    if device.type == "cpu":
        flops = measure_matmul_flops(device, dtype, _CPU_MATMUL_SIZE, seconds=_MATMUL_S)
        return torch.get_num_threads() * flops
    return measure_matmul_flops(device, dtype, _ACCELERATOR_MATMUL_SIZE, seconds=_MATMUL_S)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all work queued on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_results(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Diagnostic]:
    """Compare loss and gradients of one batch on an accelerator with those of the CPU."""
    if device.type == "cpu":
        return
    model, ids = _model_and_batch(config, torch.device("cpu"), "eager")
    error = compare_with_cpu(model, ids, device, run_precision)
    if error.is_acceptable:
        yield Diagnostic("results", "ok", f"{device.type}: {error}")
    else:
        remedy = "ACCELERATE_USE_CPU=1, or another torch version: results are wrong here"
        yield Diagnostic("results", "PROBLEM", f"{device.type}: {error}, most in {error.parameter}", remedy)


def check_attention(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Diagnostic]:
    """Yield one line per backend: the gradient's relative error against fp32 eager in each precision.

    Only an error in the backend and precision that the run uses is a PROBLEM.
    """
    expected = _gradient(config, device, "eager", "no")
    used = resolve_attention(config, device)
    for name in _ATTENTION_BACKENDS:
        reason = _unavailable_reason(name, device)
        cells, wrong = [], []
        for precision in DTYPES if reason is None else ():
            try:
                error = _relative_error(_gradient(config, device, name, precision), expected)
            except Exception as failure:  # each backend raises its own types
                reason = describe_error(failure)
                wrong.append(precision)
                continue
            is_correct = error <= _MAX_ERROR[precision]  # False for NaN
            wrong += [] if is_correct else [precision]
            cells.append(f"{_PRECISION_NAMES[precision]} {error:.0e}{'' if is_correct else ' WRONG'}")
        errors = ", ".join(cells) or "not usable here"
        text = f"{name}: {errors}{f' ({reason})' if reason else ''}{', used' if name == used else ''}"
        if name == used and (not cells or run_precision in wrong):
            other = "bf16" if run_precision == "no" else "no"
            remedy = f'--train.mixed_precision "{other}", or another torch version: results are wrong here'
            yield Diagnostic("attention", "PROBLEM", text, remedy)
        else:
            yield Diagnostic("attention", "note" if wrong or not cells else "ok", text)


def check_compile(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Diagnostic]:
    """Compare the losses of compiled blocks over several steps with those of eager blocks.

    One step is not enough: with torch 2.13's CPU compiler the first loss was right and the later ones NaN.
    """
    eager, eager_s = _losses(config, device, run_precision, compiled=False)
    try:
        compiled, compiled_s = _losses(config, device, run_precision, compiled=True)
    except Exception as error:  # no C++ compiler, no Triton, or a fault in either
        text, is_correct = f"does not work here ({describe_error(error)})", False
    else:
        tolerance = 1e-4 if run_precision == "no" else 1e-2
        is_correct = all(  # False for NaN
            math.isclose(*pair, rel_tol=tolerance) for pair in zip(eager, compiled, strict=True)
        )
        text = f"losses of {len(eager)} steps " + (
            f"match eager blocks; {eager_s / compiled_s:.1f} x their speed on two blocks"
            if is_correct
            else f"are {_format_losses(compiled)}, not {_format_losses(eager)}"
        )
    if is_correct or not resolve_compile(config.train, device):
        yield Diagnostic("torch.compile", "ok" if is_correct else "note", text)
    else:
        yield Diagnostic("torch.compile", "PROBLEM", text, "--train.compile false")


def _losses(
    config: RunConfig, device: torch.device, run_precision: str, *, compiled: bool
) -> tuple[list[float], float]:
    """Return the losses of some steps on one batch, and the seconds of the fastest step."""
    model, ids = _model_and_batch(config, device, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if compiled:
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile()
    losses, best_s = [], math.inf
    for _ in range(_NUM_COMPILED_STEPS):
        start_s = time.perf_counter()
        loss = _loss(model, ids, device, run_precision)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        best_s = min(best_s, time.perf_counter() - start_s)
    return losses, best_s


def _gradient(
    config: RunConfig, device: torch.device, attn_implementation: str, precision: str
) -> torch.Tensor:
    """Return all gradients of a small model's loss as one float32 vector."""
    model, ids = _model_and_batch(config, device, attn_implementation)
    _loss(model, ids, device, precision).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _loss(
    model: TinyStoriesForCausalLM, ids: torch.Tensor, device: torch.device, precision: str
) -> torch.Tensor:
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "no"):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def _model_and_batch(
    config: RunConfig, device: torch.device, attn_implementation: str
) -> tuple[TinyStoriesForCausalLM, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = TinyStoriesForCausalLM._from_config(
        _reduced_config(config), attn_implementation=attn_implementation
    )
    with torch.no_grad():  # attention is nearly uniform at initialization, which hides faults in it
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim >= 2 else 0.02
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.ndim >= 2 or "bias" in name else 1 + noise)
    ids = torch.randint(_VOCAB_SIZE, (2, min(_NUM_TOKENS, config.data.seq_len)), generator=generator)
    return model.to(device).train(), ids.to(device)


def _reduced_config(config: RunConfig) -> TinyStoriesConfig:
    """Return the architecture of the run with two blocks, a small vocabulary and no dropout."""
    reduced = config.model_config(vocab_size=_VOCAB_SIZE)
    reduced.num_hidden_layers, reduced.dropout = 2, 0.0
    return reduced


def _unavailable_reason(name: str, device: torch.device) -> str | None:
    """Return why the backend cannot work here, as far as a cheap test shows; None otherwise."""
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if name != "flex_attention":
        return None
    query = torch.ones(1, 1, 16, 16, device=device, requires_grad=True)
    try:
        if device.type == "cpu":  # other devices compile it, which `check_attention` does
            flex_attention(query, query, query)
    except NotImplementedError as error:
        return str(error).split(".")[0]
    return None


def _relative_error(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    return ((gradient - expected).norm() / expected.norm()).item()


def _format_losses(losses: list[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)
