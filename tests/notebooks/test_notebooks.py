"""The notebooks: their stored outputs, and their execution with and without the answers to the exercises."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tinystories_slm.config import parse_config
from tinystories_slm.training import train

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
pytest.importorskip("nbclient", reason="needs the extra notebooks")
pytest.importorskip("jupytext", reason="needs the extra notebooks")

import build_notebooks as build  # noqa: E402

MAX_BYTES = 1_500_000
"""Of all notebooks; GitHub displays no large ones."""


def stored(name: str):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_there_is_a_notebook_for_each_source():
    assert len(build.NAMES) == 8
    notebooks = (ROOT / "notebooks").glob("*.ipynb")
    assert sorted(path.stem for path in notebooks) == build.NAMES
    page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+)\.ipynb\)", page) == build.NAMES
    assert sum((ROOT / "notebooks" / f"{name}.ipynb").stat().st_size for name in build.NAMES) < MAX_BYTES


@pytest.mark.parametrize("name", build.NAMES)
def test_stored_outputs_are_those_of_the_source(name):
    notebook, source = stored(name), build.read_source(name)
    nbformat.validate(notebook)
    parts = [[(cell.cell_type, cell.source, cell.id) for cell in book.cells] for book in (notebook, source)]
    assert parts[0] == parts[1], "run `make notebooks`"

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(map(text_of, code))
    assert not re.search(r"/(root|home|tmp|Users)/", printed)


@pytest.mark.parametrize("name", build.NAMES)
def test_exercises_have_a_stub_a_check_and_an_answer(name):
    notebook = stored(name)
    stubs, checks = tagged(notebook, "exercise"), tagged(notebook, "check")
    assert len(stubs) == len(checks) == len(build.read_answers(name)) >= 2
    for number, check in enumerate(checks, start=1):
        assert text_of(check).endswith(f"Exercise {number}: not yet\n")
        assert f"## Exercise {number}\n" in "".join(cell.source for cell in notebook.cells)


@pytest.mark.parametrize("name", build.NAMES)
def test_links_of_a_notebook_lead_to_files(name):
    text = "".join(cell.source for cell in stored(name).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (ROOT / "notebooks" / link).exists()] == []


def test_the_first_cell_installs_a_missing_package(monkeypatch):
    """On Colab, from the address that the reader sets; the placeholder is rejected."""
    commands = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    cell = next(cell.source for cell in build.read_source("1_tokens").cells if cell.cell_type == "code")
    with pytest.raises(AssertionError, match="REPOSITORY must be the address"):
        exec(cell, {})
    address = "https://github.com/someone/tinystories_slm"
    exec(cell.replace("https://github.com/USER/tinystories_slm", address), {})
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", f"git+{address}"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the model that the notebooks share, trained as the first of them does."""
    folder = tmp_path_factory.mktemp("course")
    flags = ["--output_dir", str(folder / "runs/course"), "--data.data_dir", str(folder / "data/course")]
    train(parse_config(["--config", str(ROOT / "configs/course.yaml"), *flags]))
    return folder


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("name", build.NAMES)
def test_notebook_runs_and_its_checks_distinguish_stub_and_answer(name, trained, tmp_path):
    """Each answer and a copy of its check follow the check of the stub."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    notebook, answers = build.read_source(name), iter(build.read_answers(name))
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "check" in cell.metadata.get("tags", []):
            cells.append(nbformat.v4.new_code_cell(next(answers)))
            cells.append(nbformat.v4.new_code_cell(cell.source, metadata={"tags": ["check"]}))
    notebook.cells = cells
    build.execute(notebook, tmp_path)

    results = [text_of(cell).splitlines()[-1] for cell in tagged(notebook, "check")]
    exercises = range(1, len(results) // 2 + 1)
    assert results == [f"Exercise {n}: {result}" for n in exercises for result in ("not yet", "correct")]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
