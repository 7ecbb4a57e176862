"""Which number type the matrix products run in."""

import torch

from tinystories_slm.errors import InputError


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """`no`, `fp16` or `bf16` for Accelerate; `auto` is bf16 where the hardware multiplies it natively.

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
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False
