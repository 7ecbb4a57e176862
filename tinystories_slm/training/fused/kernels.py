"""kernels.c, called through ctypes, each kernel on as many threads as torch uses."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tinystories_slm.native import address, compile_library

_SOURCE = Path(__file__).with_name("kernels.c")
# Sums may be taken in another order, so that they are vectorized; unlike under -ffast-math a NaN stays one,
# and the loop sees it.
_ARITHMETIC = (
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
    "-ffp-contract=fast",
)
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

GELU_TANH, SILU_GATED, RELU2_GATED = range(3)


class Heads(ctypes.Structure):
    """What the kernels have to know of attention, in the order of kernels.c."""

    _fields_ = [
        *((name, _INT) for name in "BTHKD"),
        ("eps", _FLOAT),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "cos", "sin")),
    ]


_HEADS = ctypes.POINTER(Heads)
# The number of threads, which comes first everywhere, left out.
_ARGUMENTS = {
    "norm_forward": [_INT, _INT, _INT, _FLOAT, *[_POINTER] * 4],
    "norm_backward": [_INT, _INT, _INT, *[_POINTER] * 6],
    "heads_forward": [_HEADS, *[_POINTER] * 5],
    "heads_backward": [_HEADS, *[_POINTER] * 7],
    "heads_to_tokens": [_HEADS, _INT, _INT, _POINTER, _POINTER],
    "tokens_to_heads": [_HEADS, _POINTER, _POINTER],
    "softmax_forward": [_INT, _INT, _INT, _INT, _POINTER],
    "softmax_backward": [_INT, _INT, _INT, _INT, _POINTER, _POINTER],
    "activation_forward": [_INT, _INT, _INT, _POINTER, _POINTER],
    "activation_backward": [_INT, _INT, _INT, *[_POINTER] * 4],
    "cross_entropy": [_INT, _INT, *[_POINTER] * 4],
}


class Kernels:
    """The functions of kernels.c for one type of stored numbers; tensors are passed as they are."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_INT, *arguments], None
            setattr(self, name, functools.partial(_call, function))


def _call(function, *arguments: object) -> None:
    function(torch.get_num_threads(), *(address(a) if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for tensors of `dtype` (float32 or bfloat16); None where they cannot be had (see
    `compile_library`)."""
    library = compile_library(_SOURCE, dtype, arithmetic=_ARITHMETIC)
    return library and Kernels(library)
