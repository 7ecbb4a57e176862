"""Peak FLOP/s of a device, published or measured, and the model FLOPs utilization (MFU) of a run."""

import re
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

_MEASURE_S = 0.1


@dataclass(frozen=True)
class PeakFlops:
    """Peak FLOP/s of the device of one process, in matrix products."""

    flops_per_second: float
    method: str
    """How the number was obtained: `published ...` or `measured: ...`."""

    @property
    def is_measured(self) -> bool:
        """Whether the peak was measured on this machine, not taken from a data sheet."""
        return self.method.startswith("measured")


def mfu(
    tokens_per_second: float, flops_per_token: float, peak: PeakFlops, *, num_processes: int = 1
) -> float:
    """Model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B): model FLOP/s divided by peak FLOP/s.

    `tokens_per_second` is the total of all processes. The result lies between 0 and 1, but can exceed 1 if
    other programs ran while the peak was measured.
    """
    return tokens_per_second * flops_per_token / (peak.flops_per_second * num_processes)


class _Published(NamedTuple):
    """Dense peaks in TFLOP/s, without sparsity, with float32 accumulation of 16-bit products."""

    float32: float
    tf32: float | None
    fp16: float
    bf16: float | None


# From the vendors' data sheets and architecture white papers. Order matters: the first match wins.
_PUBLISHED_PEAKS = {
    r"B200": _Published(75, 1125, 2250, 2250),
    r"H200 NVL": _Published(60, 417.5, 835.5, 835.5),
    r"H200|GH200": _Published(66.9, 494.7, 989.4, 989.4),
    r"H100 NVL": _Published(60, 417.5, 835.5, 835.5),
    r"H100 PCIe": _Published(51.2, 378, 756, 756),
    r"H100": _Published(66.9, 494.7, 989.4, 989.4),
    r"A100": _Published(19.5, 156, 312, 312),
    r"A40": _Published(37.4, 74.8, 149.7, 149.7),
    r"A30": _Published(10.3, 82, 165, 165),
    r"A10": _Published(31.2, 62.5, 125, 125),
    r"L40S": _Published(91.6, 183, 362, 362),
    r"L40": _Published(90.5, 90.5, 181, 181),
    r"L4": _Published(30.3, 60, 121, 121),
    r"V100.SXM2": _Published(15.7, None, 125, None),
    r"V100.PCIE": _Published(14, None, 112, None),
    r"T4": _Published(8.1, None, 65, None),
    r"RTX 5090": _Published(104.8, 104.8, 209.5, 209.5),
    r"RTX 4090": _Published(82.6, 82.6, 165.2, 165.2),
    r"RTX 3090": _Published(35.6, 35.6, 71, 71),
    r"MI300X": _Published(163.4, 653.7, 1307.4, 1307.4),
}
_UNLISTED_VARIANTS = re.compile(r"\b(Laptop|MIG|D|Ti)\b")  # a listed name, but another chip or a part of one


def peak_flops(device: torch.device, precision: str) -> PeakFlops:
    """Return the published dense peak of a listed GPU, otherwise measure a matrix product (about 0.1 s).

    `precision` is `no`, `fp16` or `bf16`, as `resolve_precision` returns it. `no` means float32, or TF32 if
    torch computes float32 products in TF32.
    """
    if device.type == "cuda" and (peak := _published_peak(torch.cuda.get_device_name(device), precision)):
        return peak
    return _measured_peak(device, precision)


def _published_peak(device_name: str, precision: str) -> PeakFlops | None:
    column = precision
    if precision == "no":
        column = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
    if _UNLISTED_VARIANTS.search(device_name):
        return None
    for pattern, published in _PUBLISHED_PEAKS.items():
        if re.search(rf"\b({pattern})\b", device_name):
            teraflops = getattr(published, column) or (published.float32 if column == "tf32" else None)
            if teraflops is None:
                return None
            return PeakFlops(teraflops * 1e12, f"published dense {column} peak of {device_name}")
    return None


def _measured_peak(device: torch.device, precision: str) -> PeakFlops:
    """Measure products of two square matrices and return the fastest.

    On a CPU the product runs on one thread and the result is multiplied by the number of threads. A product
    on all threads is as slow as the slowest of them: another program on one core would make the peak far too
    low.
    """
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        flops_per_second = measure_matmul_flops(device, dtype, 4096)
        return PeakFlops(
            flops_per_second, f"measured: 4096 x 4096 x 4096 product in {name} on this {device.type} device"
        )
    threads = torch.get_num_threads()
    flops_per_second = threads * measure_matmul_flops(device, dtype, 512)
    times = "" if threads == 1 else f", times {threads}"
    return PeakFlops(flops_per_second, f"measured: 512 x 512 x 512 product in {name} on 1 CPU thread{times}")


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, size: int, *, seconds: float = _MEASURE_S
) -> float:
    """Repeat the product of two `size` x `size` matrices for `seconds`, and return the FLOP/s of the fastest.

    On a CPU the product runs on one thread.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
        best_s = _matmul_s(a, b)
        start_s = time.perf_counter()
        while time.perf_counter() - start_s < seconds:
            best_s = min(best_s, _matmul_s(a, b))
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best_s


def _matmul_s(a: torch.Tensor, b: torch.Tensor) -> float:
    start_s = time.perf_counter()
    torch.mm(a, b)
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return time.perf_counter() - start_s
