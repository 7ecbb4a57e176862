"""Which number types and attention back-ends compute the right thing here, and how fast."""

import math
import time
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import flex_attention

from tinystories_slm.config import RunConfig
from tinystories_slm.doctor.finding import Finding, first_line
from tinystories_slm.errors import InputError
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.training.precision import resolve_precision
from tinystories_slm.training.settings import resolve_compile

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2")
# How far a gradient may lie from that of fp32 eager, as a share of its norm: a few times what is seen.
_MAX_ERROR = {"no": 1e-4, "bf16": 0.1, "fp16": 0.02}
_VOCAB_SIZE, _TOKENS = 512, 64
_COMPILED_STEPS = 4
_MATMUL_S = 0.3


def resolved_precision(config: RunConfig, device: torch.device) -> str:
    """The run's number type as Accelerate takes it; `no` for one that cannot be, which `precision` tells."""
    try:
        return resolve_precision(config.train.mixed_precision, device)
    except InputError:
        return "no"


def precision(config: RunConfig, device: torch.device) -> Iterator[Finding]:
    """Whether the run's number type can be, and is the one that suits the hardware."""
    asked = config.train.mixed_precision
    try:
        resolved = resolve_precision(asked, device)
    except InputError as error:
        yield Finding("precision", "PROBLEM", str(error), "--train.mixed_precision auto")
        return
    speeds = {name: matmul_flops(device, DTYPES[name]) for name in ("no", "bf16")}
    ratio = speeds["bf16"] / speeds["no"]
    said = (
        f"{_NAMES[resolved]} (train.mixed_precision {asked}); products reach "
        f"{speeds['no'] / 1e9:,.0f} GFLOP/s in fp32, {speeds['bf16'] / 1e9:,.0f} in bf16"
    )
    # Between the two lies what a busy machine measures.
    if resolved == "no" and ratio > 1.5:
        yield Finding("precision", "slow", said, "--train.mixed_precision bf16")
    elif resolved == "bf16" and ratio < 0.67:
        yield Finding("precision", "slow", said, '--train.mixed_precision "no"')
    else:
        yield Finding("precision", "ok", said)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of some square matrix products."""
    size = 768 if device.type == "cpu" else 8192
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    best_s, began_s = math.inf, time.perf_counter()
    while best_s == math.inf or time.perf_counter() - began_s < _MATMUL_S:
        since_s = time.perf_counter()
        torch.mm(a, b)
        wait_for(device)
        best_s = min(best_s, time.perf_counter() - since_s)
    return 2 * size**3 / best_s


def wait_for(device: torch.device) -> None:
    """Until all that was asked of `device` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def attention(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Finding]:
    """A line for each back-end: the gradient's relative error against fp32 eager, in each number type.

    What the run itself would use has to work; the rest is told.
    """
    expected = _gradient(config, device, "eager", "no")
    used = TinyStoriesForCausalLM(_small(config)).config._attn_implementation
    for name in _ATTENTION:
        reason = _known_to_fail(name, device)
        cells, wrong = [], []
        for number_type in DTYPES if reason is None else ():
            try:
                error = _distance(_gradient(config, device, name, number_type), expected)
            except Exception as refusal:  # each back-end has its own ways of saying no
                reason = first_line(refusal)
                wrong.append(number_type)
                continue
            good = error <= _MAX_ERROR[number_type]  # not so for nan
            wrong += [] if good else [number_type]
            cells.append(f"{_NAMES[number_type]} {error:.0e}{'' if good else ' WRONG'}")
        needed = name == used and (not cells or run_precision in wrong)
        works = ", ".join(cells) or "not usable here"
        said = f"{name}: {works}{f' ({reason})' if reason else ''}{', used' if name == used else ''}"
        if needed:
            other = "bf16" if run_precision == "no" else "no"
            remedy = f'--train.mixed_precision "{other}", or another torch: this one computes it wrongly here'
            yield Finding("attention", "PROBLEM", said, remedy)
        else:
            yield Finding("attention", "note" if wrong or not cells else "ok", said)


def compilation(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Finding]:
    """Losses of compiled blocks over some steps against those of plain ones.

    More than one step: torch 2.13's CPU compiler has been seen to be right in the first and nan after it.
    """
    plain, plain_s = _losses(config, device, run_precision, compiled=False)
    try:
        compiled, compiled_s = _losses(config, device, run_precision, compiled=True)
    except Exception as error:  # no C++ compiler, no Triton, or a fault in either
        said, right = f"does not work here ({first_line(error)})", False
    else:
        tolerance = 1e-4 if run_precision == "no" else 1e-2
        right = all(
            math.isclose(*pair, rel_tol=tolerance) for pair in zip(plain, compiled, strict=True)
        )  # never for nan
        said = f"losses of {len(plain)} steps " + (
            f"equal those of plain blocks; {plain_s / compiled_s:.1f} x their speed on two blocks"
            if right
            else f"are {_listed(compiled)}, not {_listed(plain)}"
        )
    if right or not resolve_compile(config.train, device):
        yield Finding("torch.compile", "ok" if right else "note", said)
    else:
        yield Finding("torch.compile", "PROBLEM", said, "--train.compile false")


def _losses(
    config: RunConfig, device: torch.device, run_precision: str, *, compiled: bool
) -> tuple[list[float], float]:
    """Losses of some steps on one batch, and the seconds of the quickest."""
    model, ids = _model_and_batch(config, device, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if compiled:
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile()
    losses, best_s = [], math.inf
    for _ in range(_COMPILED_STEPS):
        began_s = time.perf_counter()
        loss = _loss(model, ids, device, run_precision)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        best_s = min(best_s, time.perf_counter() - began_s)
    return losses, best_s


def _gradient(
    config: RunConfig, device: torch.device, attn_implementation: str, number_type: str
) -> torch.Tensor:
    """All gradients of a small model's loss as one float32 vector."""
    model, ids = _model_and_batch(config, device, attn_implementation)
    _loss(model, ids, device, number_type).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _loss(
    model: TinyStoriesForCausalLM, ids: torch.Tensor, device: torch.device, number_type: str
) -> torch.Tensor:
    with torch.autocast(device.type, dtype=DTYPES[number_type], enabled=number_type != "no"):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def _model_and_batch(
    config: RunConfig, device: torch.device, attn_implementation: str
) -> tuple[TinyStoriesForCausalLM, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = TinyStoriesForCausalLM._from_config(_small(config), attn_implementation=attn_implementation)
    with torch.no_grad():  # at its initial values attention is all but uniform, and no fault in it shows
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim >= 2 else 0.02
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.ndim >= 2 or "bias" in name else 1 + noise)
    ids = torch.randint(_VOCAB_SIZE, (2, min(_TOKENS, config.data.seq_len)), generator=generator)
    return model.to(device).train(), ids.to(device)


def _small(config: RunConfig) -> TinyStoriesConfig:
    """The run's architecture with two blocks, a small vocabulary and no dropout."""
    small = config.model_config(vocab_size=_VOCAB_SIZE)
    small.num_hidden_layers, small.dropout = 2, 0.0
    return small


def _known_to_fail(name: str, device: torch.device) -> str | None:
    """Why there is no need to try, where that is cheap to find out."""
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if name != "flex_attention":
        return None
    query = torch.ones(1, 1, 16, 16, device=device, requires_grad=True)
    try:
        if device.type == "cpu":  # elsewhere it would have to be compiled, which the trial does
            flex_attention(query, query, query)
    except NotImplementedError as error:
        return str(error).split(".")[0]
    return None


def _distance(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    return ((gradient - expected).norm() / expected.norm()).item()


def _listed(losses: list[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)
