"""Precision of the matrix products."""

import functools

import torch

from tinystories_slm.errors import UserError
from tinystories_slm.hardware.peak import measure_matmul_flops

# bf16 is 2 times as fast on AMD's Zen 4, 8 times with Intel's AMX, and half as fast on an Intel without AMX.
# No processor is known in between, so a noisy measurement does not change the choice.
_MIN_SPEEDUP = 1.25
_MEASURING_S = 0.05


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """Return `no`, `fp16` or `bf16` for Accelerate; `auto` is bf16 where that is faster than float32.

    A GPU uses bf16 if it supports it natively. A CPU with bf16 instructions is measured once per process:
    with AMX bf16 is 8 times as fast as float32, without AMX half as fast on the same chip.

    Raises:
        UserError: fp16 on a CPU. Gradients in fp16 need a scaler that only GPUs have.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError(
            "train.mixed_precision (fp16) needs a GPU, but the device is a CPU; use auto, bf16 or no"
        )
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if _is_bf16_faster(device) else "no"


def _is_bf16_faster(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch < 2.10 does not report capabilities; float32 works everywhere.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return (
            bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
            and cpu_bf16_speedup() > _MIN_SPEEDUP
        )
    return False


@functools.cache
def cpu_bf16_speedup() -> float:
    """Measure the speed of a bf16 matrix product relative to float32, on one CPU thread (about 0.1 s)."""
    cpu, flops = torch.device("cpu"), {}
    for dtype in (torch.float32, torch.bfloat16):
        flops[dtype] = measure_matmul_flops(cpu, dtype, 512, seconds=_MEASURING_S)
    return flops[torch.bfloat16] / flops[torch.float32]
