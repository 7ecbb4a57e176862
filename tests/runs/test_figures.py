"""Figures in a notebook, whose `!command` inherits a matplotlib backend that may not exist."""

import os
import subprocess
import sys


def test_figures_need_no_backend_of_the_environment():
    backend = "module://not_installed.backend_inline"
    modules = "tinystories_slm.runs.recorder, tinystories_slm.runs.report"
    code = f"import os, {modules}; print(os.environ['MPLBACKEND'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=os.environ | {"MPLBACKEND": backend}, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == backend, done.stderr
