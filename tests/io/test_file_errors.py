import errno
import os
from pathlib import Path

import pytest

from tinystories_slm.config import parse_config
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import expand_user, translate_write_errors


def test_unknown_home_folder_is_one_line(monkeypatch):
    """As in a container whose user has no entry in the list of users."""
    assert expand_user("~/a") == Path.home() / "a"
    for argv in (["--output_dir", "~nobody-of-this-name/run"], ["--data.data_dir", "~nobody-of-this-name/d"]):
        with pytest.raises(UserError, match=r"path \(~nobody-of-this-name/\w+\) begins with a home folder"):
            parse_config(argv)


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EIO, "check the disk or the network drive"),
        (errno.ESTALE, "check the disk or the network drive"),
        (errno.EMFILE, r"raise the limit of open files \(ulimit -n\)"),
        (errno.ELOOP, "use another path"),
    ],
)
def test_errors_of_the_machine_name_their_fix(tmp_path, number, fix):
    path = tmp_path / "a.txt"
    message = rf"^output \(.*\) cannot be written to \(.*\); {fix}$"
    with pytest.raises(UserError, match=message), translate_write_errors("output", path):
        raise OSError(number, os.strerror(number), str(path))
