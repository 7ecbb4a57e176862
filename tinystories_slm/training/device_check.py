"""Compare loss and gradients of a batch on a device with those of the CPU."""

import copy
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from tinystories_slm.data.packing import WindowSource
from tinystories_slm.errors import UserError
from tinystories_slm.model import TinyStoriesForCausalLM

logger = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative errors of loss and gradients: many times those of rounding, a fraction of those of a fault.
_MAX_ERRORS = {"no": (1e-3, 0.01), "bf16": (0.02, 0.1), "fp16": (0.01, 0.05)}
_NUM_SEQUENCES = 2


@dataclass(frozen=True)
class DeviceError:
    """Difference between a device and the CPU."""

    device: torch.device
    precision: str
    """Precision on the device: `no`, `bf16` or `fp16`. The CPU computes in float32."""
    loss: float
    """Difference of the losses, relative to the CPU's."""
    gradient: float
    """Norm of the difference of all gradients, relative to that of the CPU's."""
    parameter: str
    """Name of the parameter whose gradient differs most."""

    @property
    def is_acceptable(self) -> bool:
        """Whether rounding explains the difference; False for NaN."""
        max_loss, max_gradient = _MAX_ERRORS[self.precision]
        return self.loss <= max_loss and self.gradient <= max_gradient

    def __str__(self) -> str:
        return f"the loss differs from the CPU's by {self.loss:.1e}, the gradients by {self.gradient:.1e}"


def check_device(
    model: TinyStoriesForCausalLM, dataset: WindowSource, device: torch.device, precision: str
) -> None:
    """Compare Apple's GPU (MPS) with the CPU before a run's first step; other devices are not compared.

    Its matrix products were wrong in some versions of torch and macOS (pytorch#109457): the loss falls, and
    the model is useless. Two sequences of `dataset` are used; nothing is changed. `doctor.py` compares every
    device.

    Raises:
        UserError: the device computes another loss or other gradients.
    """
    if device.type != "mps":
        return
    input_ids = torch.from_numpy(dataset.batch(0, _NUM_SEQUENCES).input_ids)
    error = compare_with_cpu(model, input_ids, device, precision)
    if not error.is_acceptable:
        raise UserError(
            f"device ({device.type}) computes wrong numbers in torch {torch.__version__}: {error}, most in "
            f"{error.parameter}; set ACCELERATE_USE_CPU=1, or install another version of torch"
        )
    logger.info("%s: %s", device.type, error)


def compare_with_cpu(
    model: TinyStoriesForCausalLM, input_ids: Tensor, device: torch.device, precision: str
) -> DeviceError:
    """Compare loss and gradients of copies of `model` on `device` and on the CPU, without dropout.

    `input_ids` (B, T) are on the CPU. The CPU computes in float32.
    """
    cpu = torch.device("cpu")
    expected_loss, expected = _loss_and_gradients(_copy_to(model, cpu), input_ids, "no")
    loss, gradients = _loss_and_gradients(_copy_to(model, device), input_ids, precision)
    differences = {name: (gradients[name] - expected[name]).norm() for name in expected}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return DeviceError(
        device=device,
        precision=precision,
        loss=abs(loss - expected_loss) / expected_loss,
        gradient=(torch.stack(list(differences.values())).norm() / norm).item(),
        parameter=max(differences, key=lambda name: differences[name].nan_to_num(torch.inf)),
    )


def _copy_to(model: TinyStoriesForCausalLM, device: torch.device) -> TinyStoriesForCausalLM:
    return copy.deepcopy(model).to(device)


def _loss_and_gradients(
    model: TinyStoriesForCausalLM, input_ids: Tensor, precision: str
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss, and the float32 gradients on the CPU by parameter."""
    model.eval().zero_grad(set_to_none=True)
    input_ids = input_ids.to(model.device)
    with torch.autocast(input_ids.device.type, dtype=_DTYPES[precision], enabled=precision != "no"):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, loss_only=True).loss
    loss.backward()
    return loss.item(), {name: p.grad.cpu().float() for name, p in model.named_parameters()}
