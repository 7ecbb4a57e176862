from pathlib import Path

import pytest

from tinystories_slm.config import parse_config
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import expand_user


def test_unknown_home_folder_is_one_line(monkeypatch):
    """As in a container whose user has no entry in the list of users."""
    assert expand_user("~/a") == Path.home() / "a"
    for argv in (["--output_dir", "~nobody-of-this-name/run"], ["--data.data_dir", "~nobody-of-this-name/d"]):
        with pytest.raises(UserError, match=r"path \(~nobody-of-this-name/\w+\) begins with a home folder"):
            parse_config(argv)
