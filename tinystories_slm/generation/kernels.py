"""kernels.c, compiled for this processor by the C compiler at hand, and called through ctypes."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# Linked without -ffast-math, with which a library would change the rounding of its whole process.
_LINK = ("-shared", "-fopenmp")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Layer(ctypes.Structure):
    """Addresses of one layer's tensors, in the order of kernels.c."""

    _fields_ = [
        (name, _POINTER)
        for name in (
            *("norm_1", "norm_1_bias", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias"),
            *("norm_2", "norm_2_bias", "up", "up_bias", "down", "down_bias", "keys", "values"),
        )
    ]


class Model(ctypes.Structure):
    """Sizes of a model and addresses of its tensors, in the order of kernels.c."""

    _fields_ = [
        *((name, _INT) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, _INT) for name in ("vocab", "capacity", "modern", "threads")),
        ("eps", ctypes.c_double),
        *((name, _POINTER) for name in ("embedding", "positions", "cos", "sin", "norm", "norm_bias", "head")),
        ("layers", ctypes.POINTER(Layer)),
    ]


MAX_HEAD_DIM = 256
LANES = 16
"""Positions whose keys lie together in the cache, and what its length is a multiple of."""


@functools.cache
def load_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for matrices and cache of `dtype`; None, with a line in the log, where they cannot be had.

    Compiled on first use, in about a second, and kept in the user's cache folder under a name that changes
    with source, compiler and processor.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.info("no C compiler (cc, or what CC names): attention stays torch's")
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler, dtype))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.info("kernels.c does not compile here (%s): attention stays torch's", reason.splitlines()[0])
        return None


def _compiled(compiler: str, dtype: torch.dtype) -> Path:
    flags = (*_COMPILE, *(("-DBFLOAT16",) if dtype == torch.bfloat16 else ()))
    made_of = (compiler, os.stat(compiler).st_mtime_ns, flags, _SOURCE.read_text(), *_processor())
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinystories_slm"
    library = cache / f"kernels_{name}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects, linked = Path(folder) / "kernels.o", Path(folder) / library.name
        for command in (
            [compiler, *flags, str(_SOURCE), "-o", str(objects)],
            [compiler, *_LINK, str(objects), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        linked.replace(library)  # whole or not at all, whoever else compiles
    logger.info("kernels.c compiled in %.1f s, kept as %s", time.perf_counter() - started_s, library)
    return library


def _processor() -> tuple[str, ...]:
    """What -march=native looks at: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return (platform.machine(), *sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    model = ctypes.POINTER(Model)
    library.attend.argtypes = [model, _INT, _INT, _POINTER, _POINTER, _POINTER]
    library.next_logits.argtypes = [model, _INT, _INT, _POINTER, _POINTER]
    library.activate.argtypes = [model, _INT, _POINTER, _POINTER]
    for kernel in (library.attend, library.next_logits, library.activate):
        kernel.restype = None
    return library
