"""Which number type the matrix products run in."""

import functools

import torch

from tinystories_slm.errors import InputError
from tinystories_slm.training.watching.estimate import product_flops

# Between what is gained (2 times on AMD's Zen 4, 8 times with Intel's AMX) and lost (half on an Intel without
# AMX) there is no processor known, so that a busy moment does not change the choice.
_WORTH_IT = 1.25
_MEASURING_S = 0.05


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """`no`, `fp16` or `bf16` for Accelerate; `auto` is bf16 where that is faster than float32.

    On a GPU that is where it multiplies bf16 natively. A CPU that has such instructions is measured, once a
    process: with AMX they are 8 times as fast as float32's, without it half as fast on the same chip.

    Raises:
        InputError: fp16 on a CPU, whose range gradients need a scaler that only GPUs have.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("train.mixed_precision (fp16) needs a GPU, and this is a CPU; use auto, bf16 or no")
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if _multiplies_bf16(device) else "no"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch < 2.10 cannot tell; float32 is right everywhere.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return (
            bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
            and cpu_bf16_gain() > _WORTH_IT
        )
    return False


@functools.cache
def cpu_bf16_gain() -> float:
    """How many times as fast as in float32 a matrix product in bf16 is on one thread (about 0.1 s)."""
    cpu, flops = torch.device("cpu"), {}
    for dtype in (torch.float32, torch.bfloat16):
        flops[dtype] = product_flops(cpu, dtype, 512, seconds=_MEASURING_S)
    return flops[torch.bfloat16] / flops[torch.float32]
