"""ctypes bindings of kernels.c. Each kernel runs on `torch.get_num_threads()` threads."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tinystories_slm.kernels.build import compile_library, data_ptr

_SOURCE = Path(__file__).with_name("kernels.c")
# These flags let the compiler reorder sums and so vectorize them. -ffast-math would also assume that no NaN
# occurs, and hide one from the training loop.
_MATH_FLAGS = (
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
    """Shape, norms, rotary angles and stories of attention; fields in the order of kernels.c."""

    _fields_ = [
        *((name, _INT) for name in "BTHKD"),
        ("eps", _FLOAT),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "cos", "sin")),
        ("angle_rows", _INT),
        ("first_keys", _POINTER),
    ]


_HEADS = ctypes.POINTER(Heads)
# Without the number of threads, which is the first argument of every kernel.
_ARGTYPES = {
    "norm_forward": [_INT, _INT, _INT, _FLOAT, *[_POINTER] * 4],
    "norm_backward": [_INT, _INT, _INT, *[_POINTER] * 6],
    "heads_forward": [_HEADS, *[_POINTER] * 5],
    "heads_backward": [_HEADS, *[_POINTER] * 7],
    "heads_to_tokens": [_HEADS, _INT, _INT, _POINTER, _POINTER],
    "tokens_to_heads": [_HEADS, _POINTER, _POINTER],
    "softmax_forward": [_HEADS, _INT, _INT, _INT, _POINTER],
    "softmax_backward": [_HEADS, _INT, _INT, _INT, _POINTER, _POINTER],
    "activation_forward": [_INT, _INT, _INT, _POINTER, _POINTER],
    "activation_backward": [_INT, _INT, _INT, *[_POINTER] * 4],
    "cross_entropy": [_INT, _INT, *[_POINTER] * 4],
}


class Kernels:
    """The functions of kernels.c for one dtype; each takes tensors and passes their addresses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGTYPES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_INT, *arguments], None
            setattr(self, name, functools.partial(_call, function))


def _call(function, *arguments: object) -> None:
    function(torch.get_num_threads(), *(data_ptr(a) if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """Load the kernels for float32 or bfloat16 tensors; None if `compile_library` cannot build them."""
    library = compile_library(_SOURCE, dtype, math_flags=_MATH_FLAGS)
    return library and Kernels(library)
