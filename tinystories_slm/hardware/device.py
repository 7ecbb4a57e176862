"""Selection of the torch device."""

import torch
from accelerate.utils import parse_flag_from_env

from tinystories_slm.errors import UserError


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device of that name; None or `auto` selects CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: the device is not available on this machine or in this build of torch.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None or name == "auto":
        return torch.device(next(kind for kind, is_available in available.items() if is_available))
    device = torch.device(name)
    if not available.get(device.type, True):
        raise UserError(f"device ({name}) is not available in torch {torch.__version__}; use auto or cpu")
    return device


def training_device() -> torch.device:
    """Return the device that a training process uses: the accelerator if one is available, else the CPU.

    `ACCELERATE_USE_CPU` selects the CPU, as in accelerate.
    """
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()
