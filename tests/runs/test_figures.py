"""Figures in a notebook, whose `!command` inherits a matplotlib backend that may not exist."""

import os
import subprocess
import sys

import pytest


def run_with_backend(backend: str, code: str) -> str:
    # --help: the package imports neither torch nor transformers.
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        capture_output=True, text=True, env=os.environ | {"MPLBACKEND": backend}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_figures_need_no_backend_of_the_environment():
    backend = "module://not_installed.backend_inline"
    modules = "tinystories_slm.runs.recorder, tinystories_slm.runs.report"
    assert run_with_backend(backend, f"import os, {modules}; print(os.environ['MPLBACKEND'])") == backend


def test_figures_ignore_an_unknown_backend():
    code = "from tinystories_slm.runs import figures; print(figures.Figure.__name__)"
    assert run_with_backend("not_a_backend", code) == "Figure"


@pytest.mark.parametrize(
    ("before", "expected"),
    [("", "svg"), ("import matplotlib; matplotlib.use('pdf')", "pdf")],  # the choice of a user stays
)
def test_pyplot_uses_the_backend_of_the_environment(before, expected):
    """The kernel of a notebook sets the variable; without the backend, its pyplot displays no figure."""
    imports = "import tinystories_slm.runs.figures, matplotlib.pyplot as plt"
    assert run_with_backend("svg", f"{before}\n{imports}; print(plt.get_backend())") == expected
