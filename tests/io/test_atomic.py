import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import (
    atomic_directory,
    atomic_write,
    directory_lock,
    file_sha256,
    recover_directory,
    replace_directory,
)


def fill(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "a.txt").write_text(text)
    return folder


def test_atomic_write_replaces_the_file_on_success(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_directory_appears_on_success(tmp_path):
    path = tmp_path / "raw"
    fill(tmp_path / "raw.partial", "left by a killed process")
    with atomic_directory(path) as partial:
        assert not list(partial.iterdir())
        (partial / "b.txt").write_text("new")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["b.txt"]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_directory_is_removed_on_error(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "raw") as partial:
        (partial / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_atomic_directory_rejects_an_existing_path(tmp_path):
    fill(tmp_path / "raw", "old")
    with pytest.raises(UserError, match=r"raw exists.*move it away"), atomic_directory(tmp_path / "raw"):
        pytest.fail("yielded a directory")
    assert (tmp_path / "raw" / "a.txt").read_text() == "old"


@pytest.mark.parametrize("has_old", [False, True])
def test_replace_directory_leaves_only_the_new_one(tmp_path, has_old):
    folder = tmp_path / "best"
    if has_old:
        fill(folder, "old")
    replace_directory(fill(tmp_path / "best.partial", "new"), folder)
    assert (folder / "a.txt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_recover_directory_restores_the_old_one(tmp_path):
    # The state after a kill between the two renames of `replace_directory`.
    fill(tmp_path / "best.old", "old")
    fill(tmp_path / "best.partial", "new")
    recover_directory(tmp_path / "best")
    assert (tmp_path / "best" / "a.txt").read_text() == "old"
    recover_directory(tmp_path / "best")
    assert not (tmp_path / "best.old").exists()


_WAIT_FOR_LOCK = """
import sys
from pathlib import Path
from tinystories_slm.io.atomic import directory_lock
print("started", flush=True)
with directory_lock(Path(sys.argv[1])):
    print((Path(sys.argv[1]) / "a.txt").read_text())
"""


def test_directory_lock_excludes_other_processes(tmp_path):
    folder = tmp_path / "data"
    with directory_lock(folder):
        other = subprocess.Popen(
            # With --help, the package does not import torch, which takes seconds.
            [sys.executable, "-c", _WAIT_FOR_LOCK, folder, "--help"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout.readline() == "started\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=0.3)
        (folder / "a.txt").write_text("written under the lock")
    output, _ = other.communicate(timeout=60)
    assert output == "written under the lock\n"


def test_directory_lock_rejects_a_path_that_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with (
        pytest.raises(UserError, match=r"data\.data_dir .* cannot be written to .*--data\.data_dir"),
        directory_lock(tmp_path / "file" / "data"),
    ):
        pytest.fail("locked")


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, UserError), (errno.EIO, OSError)])
def test_directory_lock_translates_only_disk_errors(tmp_path, number, expected):
    with pytest.raises(expected) as raised, directory_lock(tmp_path):
        raise OSError(number, "from the block")
    assert type(raised.value) is expected


def test_file_sha256_hashes_the_bytes(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"once" * 100_000)
    assert file_sha256(tmp_path / "a.bin") == hashlib.sha256(b"once" * 100_000).hexdigest()
