"""Write the notebooks from source/*.py and execute them: notebooks/build_notebooks.py 1_tokens, or all."""

import os
import resource
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NAMES = [path.stem for path in sorted((FOLDER / "source").glob("[0-9]*.py"))]
_TIMEOUT_S = 1800  # of one cell, on a machine with other work
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def read_source(name: str) -> NotebookNode:
    """Return the notebook `name` without outputs; the cells of setup.py follow its first one."""
    notebook = jupytext.read(FOLDER / "source" / f"{name}.py", fmt="py:percent")
    setup = jupytext.read(FOLDER / "source" / "setup.py", fmt="py:percent")
    notebook.cells[1:1] = setup.cells
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL})
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"  # jupytext draws a random one
    return notebook


def read_answers(name: str) -> list[str]:
    """Return the answers to the exercises of the notebook `name`, in order."""
    answers = jupytext.read(FOLDER / "answers" / f"{name}.py", fmt="py:percent")
    return [cell.source for cell in answers.cells if cell.cell_type == "code"]


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in `folder`, and keep their outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    # tqdm misses ipywidgets, and its bars would fill the outputs.
    os.environ |= {"PYTHONWARNINGS": "ignore:IProgress not found", "TQDM_DISABLE": "1"}
    NotebookClient(
        notebook,
        timeout=_TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def main() -> None:
    """Write and execute the notebooks that the command line names, by default all."""
    for name in sys.argv[1:] or NAMES:
        notebook = read_source(name)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        execute(notebook, FOLDER)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{name}: {seconds:.0f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
