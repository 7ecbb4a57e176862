"""Compile the C kernels of this package for this CPU on first use, and load them through ctypes."""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tinystories_slm.hardware.host import cpu_features, loaded_libraries
from tinystories_slm.io.atomic import file_sha256

logger = logging.getLogger(__name__)

_HEADER = Path(__file__).with_name("dtypes.h")
_CFLAGS = ("-O3", "-fPIC", "-c", f"-I{_HEADER.parent}")
# The first that the compiler accepts is used. clang for ARM had no -march=native for years.
_ARCH_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_DTYPE_FLAGS = {torch.bfloat16: ("-DBFLOAT16",), torch.int8: ("-DINT8",)}
_TIMEOUT_S = 60


@dataclass(frozen=True)
class _Build:
    """All that decides the machine code of one library."""

    source: Path
    compiler: tuple[str, ...]
    """Words of the command, which may start with a wrapper: `ccache gcc -pthread`."""
    flags: tuple[str, ...]
    openmp: str | None
    """Path of LLVM's OpenMP library, if this process has one already."""

    @property
    def name(self) -> str:
        return f"{self.source.parent.name}/{self.source.name}"

    @property
    def prefix(self) -> str:
        """Start of the file name in the cache: several machines and compilers may share one folder."""
        code = (_HEADER.read_text(encoding="utf-8"), self.source.read_text(encoding="utf-8"))
        programs = [path for word in self.compiler if (path := shutil.which(word))]
        versions = [(path, os.stat(path).st_mtime_ns) for path in programs]
        openmp = self.openmp and os.path.basename(self.openmp)
        inputs = (self.compiler, versions, self.flags, openmp, code, cpu_features())
        key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
        return f"{self.source.parent.name}_{self.source.stem}_{key}_"


def compile_library(source: Path, dtype: torch.dtype, *, math_flags: Sequence[str]) -> ctypes.CDLL | None:
    """Compile and load `source` for tensors of `dtype` (float32, bfloat16 or int8, see dtypes.h).

    Compilation takes about a second and runs on first use. The library is cached in the user's cache folder,
    under a name that depends on source, flags, compiler, CPU and its own content: a damaged library is
    compiled again. Without a folder that only this user can write to, each process compiles its own.
    `math_flags` are the compiler flags that allow floating-point reordering.

    Returns:
        None if no C compiler exists or compilation fails; the reason is logged.
    """
    compiler = _compiler()
    dtype_flags = _DTYPE_FLAGS.get(dtype, ())
    build = _Build(source, compiler, (*_CFLAGS, *math_flags, *dtype_flags), _loaded_llvm_openmp())
    if not compiler:
        logger.info("no C compiler (install cc or set CC): using torch instead of %s", build.name)
        return None
    try:
        return _load_or_compile(build)
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s does not compile or load (%s): using torch instead", build.name, _reason(error))
        return None


def _compiler() -> tuple[str, ...]:
    """Return the words of the environment variable CC, or `cc`; empty if there is no such program."""
    command = os.environ.get("CC") or "cc"
    if shutil.which(command):  # its path may contain blanks
        return (command,)
    try:
        words = tuple(shlex.split(command, posix=os.name != "nt"))
    except ValueError:  # a quote is not closed
        return ()
    return words if words and shutil.which(words[0]) else ()


def _load_or_compile(build: _Build) -> ctypes.CDLL:
    try:
        cache = _cache_folder()
    except OSError as error:
        return _compile_and_load(build, None, f"not cached: {error}")
    note = ""
    for library in sorted(cache.glob(f"{build.prefix}*.so")):
        try:
            if _content_hash(library) != library.stem.removeprefix(build.prefix):
                raise OSError("damaged")
            return _load(library, build)
        except OSError as error:
            note = f"the cached library was unusable: {error}"
    return _compile_and_load(build, cache, note)


def _compile_and_load(build: _Build, cache: Path | None, note: str) -> ctypes.CDLL:
    """Compile in a private temporary folder, keep the library in `cache` if possible, and load it."""
    started_s = time.perf_counter()
    # The file is needed only to load it. Windows cannot remove it then, which is no error.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        compiled = _compile(build, Path(folder))
        seconds = time.perf_counter() - started_s
        library = None
        if cache is not None:
            try:
                kept = _keep(compiled, cache, build.prefix)
                library, note = _load(kept, build), f"{kept}{note and f' ({note})'}"
            except OSError as error:  # the disk is full, or mounted noexec
                note = f"not cached: {error}"
        library = library or _load(compiled, build)
    logger.info("compiled %s in %.1f s: %s", build.name, seconds, note)
    return library


def _compile(build: _Build, folder: Path) -> Path:
    """Compile and link in `folder`; return the library."""
    objects, library = folder / "objects.o", folder / "library.so"
    openmp, link_openmp = _openmp_flags(build)
    compile_command = [*build.compiler, *build.flags, *openmp, str(build.source), "-o", str(objects)]
    is_chosen = any(word.startswith(("-march=", "-mcpu=")) for word in build.compiler)
    errors = []
    for arch_flags in ((),) if is_chosen else _ARCH_FLAGS:
        try:
            _run([*compile_command, *arch_flags])
            break
        except subprocess.CalledProcessError as error:
            errors.append(error)
    else:
        raise errors[0]
    # Without the math flags: a library linked with -ffast-math changes the rounding of the whole process.
    _run([*build.compiler, "-shared", *link_openmp, str(objects), "-o", str(library), "-lm"])
    return library


def _openmp_flags(build: _Build) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the OpenMP flags to compile and to link with.

    A process with two copies of LLVM's OpenMP library ends with `OMP: Error #15`. If torch has loaded one,
    code of clang uses that one; Apple's clang has no other, and knows -fopenmp behind -Xclang alone.
    """
    if build.openmp and "clang" in _run([*build.compiler, "--version"]):
        is_mac = platform.system() == "Darwin"
        return ("-Xclang", "-fopenmp"), (("-undefined", "dynamic_lookup") if is_mac else (build.openmp,))
    return ("-fopenmp",), ("-fopenmp",)


def _loaded_llvm_openmp() -> str | None:
    """Return the path of LLVM's (or Intel's) OpenMP library that this process has loaded, torch's first."""
    paths = [path for path in loaded_libraries() if re.match(r"libi?omp\d*[-.]", os.path.basename(path))]
    return min(paths, key=lambda path: f"{os.sep}torch{os.sep}" not in path, default=None)


def _run(command: Sequence[str]) -> str:
    # Messages in English. Without ccache's own cache, which might return the code of another CPU.
    env = os.environ | {"LC_ALL": "C", "CCACHE_DISABLE": "1"}
    done = subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_TIMEOUT_S,
        env=env,
    )
    return done.stdout


def _reason(error: Exception) -> str:
    """Return one line: the compiler's first error, or the message of the exception."""
    output = getattr(error, "stderr", None) or ""
    if isinstance(output, bytes):  # after a timeout, whatever the encoding
        output = output.decode("utf-8", errors="replace")
    lines = [line for line in output.split("\n") if line.strip()]
    first = lines[0] if lines and not isinstance(error, subprocess.TimeoutExpired) else str(error)
    return next((line for line in lines if "error" in line), first)


def _cache_folder() -> Path:
    """Create the folder of compiled kernels if needed, and return it.

    Raises:
        OSError: it cannot be created, or another user could change a library in it.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError("no home folder (set XDG_CACHE_HOME)") from error
    folder = Path(base) / "tinystories_slm"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "geteuid"):
        status = folder.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{folder} belongs to another user (set XDG_CACHE_HOME)")
        if status.st_mode & 0o022:
            raise PermissionError(f"{folder} can be written to by other users (chmod go-w)")
    return folder


def _keep(library: Path, cache: Path, prefix: str) -> Path:
    """Copy `library` to `cache` and remove earlier ones of that prefix; return the copy."""
    kept = cache / f"{prefix}{_content_hash(library)}.so"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        shutil.copyfile(library, Path(folder) / "library.so")
        (Path(folder) / "library.so").replace(kept)  # atomic: another process may compile the same library
    for other in cache.glob(f"{prefix}*.so"):
        if other != kept:
            other.unlink(missing_ok=True)
    return kept


def _content_hash(library: Path) -> str:
    return file_sha256(library)[:16]


def _load(library: Path, build: _Build) -> ctypes.CDLL:
    if not build.openmp or os.name == "nt":
        return ctypes.CDLL(str(library))
    # Not a second copy: this lets the kernels find the functions of the loaded one.
    ctypes.CDLL(build.openmp, mode=os.RTLD_NOLOAD | ctypes.RTLD_GLOBAL)
    # Linux: before those of another OpenMP library, such as gcc's.
    return ctypes.CDLL(str(library), mode=getattr(os, "RTLD_DEEPBIND", 0))


def data_ptr(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's data, or None (NULL in C) if there is no tensor."""
    return None if tensor is None else tensor.data_ptr()
