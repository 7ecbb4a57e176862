import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinystories_slm.errors import UserError
from tinystories_slm.io import atomic
from tinystories_slm.io.atomic import (
    apply_umask,
    atomic_directory,
    atomic_write,
    directory_lock,
    file_sha256,
    recover_directory,
    replace_directory,
    write_text,
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
sys.argv[0] = "tinystories-slm"  # as a command: the package does not import torch
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
            [sys.executable, "-c", _WAIT_FOR_LOCK, folder],
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
        pytest.raises(
            UserError, match=r"^my\.option \(.*data\) cannot be written to \(Not a directory\); use"
        ),
        directory_lock(tmp_path / "file" / "data", option="my.option"),
    ):
        pytest.fail("locked")


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, UserError), (errno.EIO, UserError), (errno.EBADF, OSError)]
)
def test_directory_lock_translates_only_disk_errors(tmp_path, number, expected):
    with pytest.raises(expected) as raised, directory_lock(tmp_path):
        raise OSError(number, "from the block")
    assert type(raised.value) is expected


def test_file_sha256_hashes_the_bytes(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"once" * 100_000)
    assert file_sha256(tmp_path / "a.bin") == hashlib.sha256(b"once" * 100_000).hexdigest()


def fails_with(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_and_fsync_costs_one_line_each(tmp_path, monkeypatch, caplog, number):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(atomic, "_warned", set())
    monkeypatch.setattr(fcntl, "flock", fails_with(number))
    monkeypatch.setattr(os, "fsync", fails_with(number))
    for text in ("one", "two"):
        with directory_lock(tmp_path / "data"):
            write_text(tmp_path / "data" / "a.txt", text)
            replace_directory(fill(tmp_path / "data" / "best.partial", text), tmp_path / "data" / "best")
    assert (tmp_path / "data" / "a.txt").read_text() == "two"
    assert (tmp_path / "data" / "best" / "a.txt").read_text() == "two"
    locks, flushes = [record.message for record in caplog.records]
    assert f"{tmp_path / 'data'} is on a file system without locks" in locks and "start only one" in locks
    assert "cannot flush every file" in flushes and os.strerror(number) in flushes


@pytest.mark.parametrize("name", ["flock", "fsync"])
def test_other_errors_of_the_disk_are_not_hidden(tmp_path, monkeypatch, name):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl if name == "flock" else os, name, fails_with(errno.EIO))
    with pytest.raises(UserError, match=r"Input/output error.*; check the disk"), directory_lock(tmp_path):
        write_text(tmp_path / "a.txt", "new")
    assert not (tmp_path / "a.txt").exists()


def test_modes_are_left_alone_on_a_file_system_without_them(tmp_path, monkeypatch):
    fill(tmp_path / "best", "new")
    monkeypatch.setattr(Path, "chmod", fails_with(errno.EPERM))
    apply_umask(tmp_path)
    monkeypatch.setattr(Path, "chmod", fails_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        apply_umask(tmp_path)


def test_an_error_of_another_file_does_not_name_the_folder(tmp_path):
    with pytest.raises(PermissionError), directory_lock(tmp_path / "data"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/stories.txt")


def test_a_symbolic_link_and_a_device_stay_what_they_are(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "disk" / "a.txt")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("a.txt", "pipe"):
        write_text(tmp_path / name, "new")
    assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "disk" / "a.txt").read_text() == "new"
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 9) == b"new"
    os.close(reader)
    assert not list(tmp_path.rglob("*.partial"))


def test_replace_directory_removes_no_folder_of_the_user(tmp_path):
    (tmp_path / "disk").mkdir()
    fill(tmp_path / "disk" / "best", "old")
    fill(tmp_path / "best.old", "a copy")
    (tmp_path / "best").symlink_to(tmp_path / "disk" / "best")
    for text in ("one", "two"):
        replace_directory(fill(tmp_path / "best.partial", text), tmp_path / "best")
    texts = {path.parent.name: path.read_text() for path in tmp_path.glob("best*/a.txt")}
    assert texts == {"best": "two", "best.old": "a copy"}
    assert (tmp_path / "disk" / "best" / "a.txt").read_text() == "old"


def test_a_loop_of_links_stays_and_is_one_line(tmp_path):
    link = tmp_path / "a.txt"
    link.symlink_to(link)
    with pytest.raises(UserError, match="symbolic links"):
        atomic.write_output(link, "x")
    assert link.is_symlink()
