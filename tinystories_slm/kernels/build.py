"""Compile the C kernels of this package for this CPU on first use, and load them through ctypes."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_HEADER = Path(__file__).with_name("dtypes.h")
_CFLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c", f"-I{_HEADER.parent}")
# Link without the math flags: a library linked with -ffast-math changes the rounding of the whole process.
_LDFLAGS = ("-shared", "-fopenmp")


def compile_library(source: Path, dtype: torch.dtype, *, math_flags: Sequence[str]) -> ctypes.CDLL | None:
    """Compile and load `source` for tensors of `dtype` (float32 or bfloat16, see dtypes.h).

    Compilation takes about a second and runs on first use. The library is cached in the user's cache folder,
    under a name that depends on source, flags, compiler and CPU. `math_flags` are the compiler flags that
    allow floating-point reordering.

    Returns:
        None if no C compiler exists or compilation fails; the reason is logged.
    """
    name = f"{source.parent.name}/{source.name}"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.info("no C compiler (install cc or set CC): using torch instead of %s", name)
        return None
    try:
        return ctypes.CDLL(str(_build(source, compiler, dtype, math_flags)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.info("%s does not compile (%s): using torch instead", name, reason.splitlines()[0])
        return None


def _build(source: Path, compiler: str, dtype: torch.dtype, math_flags: Sequence[str]) -> Path:
    flags = (*_CFLAGS, *math_flags, *(("-DBFLOAT16",) if dtype == torch.bfloat16 else ()))
    code = (_HEADER.read_text(encoding="utf-8"), source.read_text(encoding="utf-8"))
    inputs = (compiler, os.stat(compiler).st_mtime_ns, flags, code, *_cpu_fingerprint())
    name = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinystories_slm"
    library = cache / f"{source.parent.name}_{source.stem}_{name}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects, linked = Path(folder) / "objects.o", Path(folder) / library.name
        for command in (
            [compiler, *flags, str(source), "-o", str(objects)],
            [compiler, *_LDFLAGS, str(objects), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        linked.replace(library)  # atomic: another process may compile the same library
    seconds = time.perf_counter() - started_s
    logger.info("compiled %s/%s in %.1f s: %s", source.parent.name, source.name, seconds, library)
    return library


def _cpu_fingerprint() -> tuple[str, ...]:
    """CPU model and features, which decide -march=native: several machines may share one cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return (platform.machine(), *sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def data_ptr(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's data, or None (NULL in C) if there is no tensor."""
    return None if tensor is None else tensor.data_ptr()
