"""ctypes bindings of kernels.c."""

import ctypes
import functools
from pathlib import Path

import torch

from tinystories_slm.kernels.build import compile_library

_SOURCE = Path(__file__).with_name("kernels.c")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Layer(ctypes.Structure):
    """Addresses of one layer's tensors; fields in the order of kernels.c."""

    _fields_ = [
        (name, _POINTER)
        for name in (
            *("norm_1", "norm_1_bias", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias"),
            *("norm_2", "norm_2_bias", "up", "up_bias", "down", "down_bias", "keys", "values"),
            *("qkv_scale", "out_scale", "up_scale", "down_scale"),
        )
    ]


class Model(ctypes.Structure):
    """Sizes of a model and addresses of its tensors; fields in the order of kernels.c."""

    _fields_ = [
        *((name, _INT) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, _INT) for name in ("vocab", "capacity", "llama", "threads")),
        ("eps", ctypes.c_double),
        *((name, _POINTER) for name in ("embedding", "positions", "cos", "sin", "norm", "norm_bias")),
        *((name, _POINTER) for name in ("head", "head_scale")),
        ("layers", ctypes.POINTER(Layer)),
    ]


MAX_HEAD_DIM = 256
LANES = 16
"""Positions whose keys are interleaved in the cache; the capacity of the cache is a multiple of it."""


@functools.cache
def load_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Load the kernels for weights and cache of `dtype`; None if `compile_library` cannot build them.

    With int8, the matrices of `next_logits` are integers, and cache and other tensors float32.
    """
    library = compile_library(_SOURCE, dtype, math_flags=("-ffast-math",))
    return library and _set_argtypes(library)


def _set_argtypes(library: ctypes.CDLL) -> ctypes.CDLL:
    model = ctypes.POINTER(Model)
    library.attend.argtypes = [model, _INT, _INT, _POINTER, _POINTER, _POINTER]
    library.next_logits.argtypes = [model, _INT, _INT, _POINTER, _POINTER]
    library.activate.argtypes = [model, _INT, _POINTER, _POINTER]
    for kernel in (library.attend, library.next_logits, library.activate):
        kernel.restype = None
    return library
