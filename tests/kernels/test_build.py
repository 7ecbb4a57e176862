"""Compilation and cache of the kernels: compilers, folders and libraries as other machines have them."""

import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from tinystories_slm.hardware.host import loaded_libraries
from tinystories_slm.kernels import build
from tinystories_slm.kernels.build import compile_library

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

SOURCE = """#include "dtypes.h"
int sum_of_threads(void) {
    int sum = 0;
#pragma omp parallel num_threads(2) reduction(+ : sum)
    sum += 40 + omp_get_thread_num();
    return sum;
}
"""
# gcc in the place of Apple's older clang: -fopenmp behind -Xclang alone, and no -march=native.
APPLE_CLANG = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/calls"
arguments=()
for argument in "$@"; do
    case "$argument $previous" in
        --version*) echo "Apple clang version 15.0.0 (clang-1500.3.9.4)"; exit 0 ;;
        "-fopenmp -Xclang") arguments+=("$argument") ;;
        -fopenmp*) echo "clang: error: unsupported option '-fopenmp'" >&2; exit 1 ;;
        -march=native*) echo "clang: error: unsupported argument 'native' to option '-march='" >&2; exit 1 ;;
        -Xclang* | -mcpu=native*) ;;
        *) arguments+=("$argument") ;;
    esac
    previous=$argument
done
exec cc "${arguments[@]}"
"""


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "tiny" / "kernels.c"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache" / "tinystories_slm"


def compiled_sum(source: Path) -> int | None:
    library = compile_library(source, torch.float32, math_flags=())
    return library and library.sum_of_threads()


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("content", [b"", b"\x7fELF of another machine"], ids=["truncated", "foreign"])
def test_damaged_library_in_the_cache_is_compiled_again(source, cache, content, caplog):
    assert compiled_sum(source) == 81
    [library] = cache.iterdir()
    whole = library.read_bytes()
    caplog.clear()
    assert compiled_sum(source) == 81 and caplog.text == ""  # loaded, not compiled

    library.unlink()  # not in place: this process has mapped it
    library.write_bytes(content)
    assert compiled_sum(source) == 81
    assert "the cached library was unusable: damaged" in caplog.text
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]


def test_cc_may_have_a_wrapper_flags_and_blanks(source, cache, tmp_path, monkeypatch, caplog):
    wrapper = program(tmp_path / "bin" / "ccache", '#!/bin/sh\n[ "$CCACHE_DISABLE" ] && exec "$@"\n')
    blank = program(tmp_path / "my tools" / "cc", '#!/bin/sh\nexec cc "$@"\n')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    for command in ("ccache cc", "cc -pthread", str(blank), "", f"'{blank}' -pthread"):
        monkeypatch.setenv("CC", command)
        assert compiled_sum(source) == 81, command
    assert len(list(cache.iterdir())) == 5  # each command has its own library
    caplog.clear()
    for command in ("absent cc", "'cc"):
        monkeypatch.setenv("CC", command)
        assert compiled_sum(source) is None
    assert caplog.text.count("no C compiler (install cc or set CC)") == 2


def test_architecture_of_cc_replaces_native(source, cache, tmp_path, monkeypatch):
    text = '#!/bin/bash\necho "$@" >> "$0.calls"\nexec cc "${@/-march=chosen/-O3}"\n'
    gcc = program(tmp_path / "bin" / "gcc", text)
    for command, expected in ((f"{gcc}", ["-march=native"]), (f"{gcc} -march=chosen", ["-march=chosen"])):
        monkeypatch.setenv("CC", command)
        assert compiled_sum(source) == 81
        calls = Path(f"{gcc}.calls")
        compiling = calls.read_text().split("\n")[0].split()
        assert [word for word in compiling if word.startswith("-march")] == expected
        calls.unlink()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_kernels_need_no_folder_for_their_cache(source, cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file: cannot hold a folder
    assert compiled_sum(source) == 81
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", no_home)  # a container without HOME and without a passwd entry
    assert compiled_sum(source) == 81
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(source, destination):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.shutil, "copyfile", full)
    assert compiled_sum(source) == 81
    notes = [line.split("not cached: ")[1] for line in caplog.text.rstrip().split("\n")]
    assert notes == [
        f"[Errno 20] Not a directory: '{source}/tinystories_slm'",
        "no home folder (set XDG_CACHE_HOME)",
        "[Errno 28] No space left on device",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny"]  # nothing is left behind
    assert list(cache.iterdir()) == []


def test_cache_that_others_may_write_to_is_not_used(source, cache, monkeypatch, caplog):
    assert compiled_sum(source) == 81
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    loaded = []
    monkeypatch.setattr(build, "_load", lambda library, build: loaded.append(library) or ctypes.CDLL(library))
    for mode in (0o770, 0o703):
        cache.chmod(mode)
        assert compiled_sum(source) == 81
    cache.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    monkeypatch.setattr(
        build.Path, "stat", lambda path, **_: os.stat_result([0o40700, 0, 0, 0, 99, *[0] * 5])
    )
    assert compiled_sum(source) == 81
    assert not any(library.is_relative_to(cache) for library in loaded) and len(loaded) == 3
    monkeypatch.undo()
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert caplog.text.count(f"not cached: {cache} can be written to by other users (chmod go-w)") == 2
    assert caplog.text.count(f"not cached: {cache} belongs to another user") == 1


def test_apple_clang_uses_the_openmp_library_that_torch_loaded(source, cache, tmp_path, monkeypatch):
    clang = program(tmp_path / "bin" / "clang", APPLE_CLANG)
    monkeypatch.setenv("CC", str(clang))
    libraries = loaded_libraries()
    [openmp] = [path for path in libraries if "libgomp" in path and "torch" in path]
    monkeypatch.setattr(build, "_loaded_llvm_openmp", lambda: openmp)
    assert compiled_sum(source) == 81
    assert [path for path in loaded_libraries() if "omp" in path] == [p for p in libraries if "omp" in p]
    version, march, mcpu, link = (clang.parent / "calls").read_text().rstrip().split("\n")
    assert version == "--version" and "-Xclang -fopenmp" in march and march.endswith("-march=native")
    assert mcpu.endswith("-mcpu=native") and "-fopenmp" not in link and openmp in link


def test_loaded_llvm_openmp_is_torchs_if_there_are_several(monkeypatch):
    found = ["/usr/lib/libgomp.so.1", "/opt/sklearn/libomp.dylib", "/opt/torch/lib/libiomp5.so"]
    monkeypatch.setattr(build, "loaded_libraries", lambda: found)
    assert build._loaded_llvm_openmp() == "/opt/torch/lib/libiomp5.so"
    monkeypatch.setattr(build, "loaded_libraries", lambda: found[:2])
    assert build._loaded_llvm_openmp() == "/opt/sklearn/libomp.dylib"
    monkeypatch.setattr(build, "loaded_libraries", lambda: found[:1])
    assert build._loaded_llvm_openmp() is None


def test_compiler_messages_are_logged_as_one_line_of_text(source, cache, tmp_path, monkeypatch, caplog):
    slow = program(tmp_path / "bin" / "slow", "#!/bin/sh\necho 'licence: error 7 \\377' >&2\nexec sleep 20\n")
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(build, "_TIMEOUT_S", 0.3)
    assert compiled_sum(source) is None
    assert "(licence: error 7 \ufffd): using torch instead" in caplog.text
    monkeypatch.setattr(build, "_TIMEOUT_S", 60)
    monkeypatch.setenv("CC", "cc")
    source.write_text("#warning note\nint x = ;\n")
    assert compiled_sum(source) is None
    assert "error: expected expression before" in caplog.text and caplog.text.count("\n") == 2
