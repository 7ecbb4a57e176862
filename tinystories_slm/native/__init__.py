"""C code of this package, compiled for this processor by the compiler at hand and called through ctypes."""

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

_HEADER = Path(__file__).with_name("numbers.h")
_COMPILE = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c", f"-I{_HEADER.parent}")
# Linked without the flags for arithmetic: a library linked with -ffast-math would change the rounding of its
# whole process.
_LINK = ("-shared", "-fopenmp")


def compile_library(source: Path, dtype: torch.dtype, *, arithmetic: Sequence[str]) -> ctypes.CDLL | None:
    """The library of `source` for stored numbers of `dtype` (float32 or bfloat16, see numbers.h).

    Compiled on first use, in about a second, and kept in the user's cache folder under a name that changes
    with source, compiler and processor. `arithmetic` are the compiler's flags for what it may reorder.

    Returns:
        None, with a line in the log, where there is no C compiler, or none that does it.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.info("no C compiler (cc, or what CC names): %s is left to torch", source.name)
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler, dtype, arithmetic)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.info("%s does not compile here (%s): left to torch", source.name, reason.splitlines()[0])
        return None


def _compiled(source: Path, compiler: str, dtype: torch.dtype, arithmetic: Sequence[str]) -> Path:
    flags = (*_COMPILE, *arithmetic, *(("-DBFLOAT16",) if dtype == torch.bfloat16 else ()))
    code = (_HEADER.read_text(encoding="utf-8"), source.read_text(encoding="utf-8"))
    made_of = (compiler, os.stat(compiler).st_mtime_ns, flags, code, *_processor())
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
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
            [compiler, *_LINK, str(objects), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        linked.replace(library)  # whole or not at all, whoever else compiles
    logger.info("%s compiled in %.1f s, kept as %s", source.name, time.perf_counter() - started_s, library)
    return library


def _processor() -> tuple[str, ...]:
    """What -march=native looks at: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return (platform.machine(), *sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin, for a kernel; None, which C knows as NULL, for none."""
    return None if tensor is None else tensor.data_ptr()
