"""The commands in a notebook: a running event loop, streams that are no files, the inline backend."""

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
pytest.importorskip("nbclient", reason="needs the extra notebooks")
pytest.importorskip("jupytext", reason="needs the extra notebooks")

from build_notebooks import execute  # noqa: E402

FLAGS = f"--config {ROOT / 'configs/debug.yaml'} --output_dir run --data.data_dir data --train.max_steps 12"
COMMANDS = {
    "doctor": FLAGS,
    "train": FLAGS,
    "evaluate": "--model run/best --data builtin --max_stories 4 --tasks ended",
    "generate": "--model run/best --max_new_tokens 8 --num_stories 2",
    "report": "--run run",
    "export": "--model run/best --format native --output native",
    "push_to_hub": "--run run --repo_id tester/tales --dry_run",
}


@pytest.mark.weekly
def test_commands_run_in_the_kernel_of_a_notebook(tmp_path):
    cells = [
        "import asyncio\nfrom tinystories_slm.commands import run",
        "asyncio.get_running_loop().is_running()",
    ]
    cells += [f"run({name!r}, {flags.split()!r})" for name, flags in COMMANDS.items()]
    cells += ["import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"]
    cells += ["run('generate', ['--model', 'run/best', '--top_p', '2'])"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    notebook.cells[-1].metadata["tags"] = ["raises-exception"]
    execute(notebook, tmp_path)

    _, is_running, *commands, plot, wrong = notebook.cells
    assert is_running.outputs[0].data["text/plain"] == "True"
    printed = {
        name: "".join(output.get("text", "") for output in cell.outputs)
        for name, cell in zip(COMMANDS, commands, strict=True)
    }
    assert "run complete: all 12 steps" in printed["train"]
    assert "Once upon a time" in printed["generate"] and "perplexity" in printed["evaluate"]
    assert "nothing was uploaded" in printed["push_to_hub"] and (tmp_path / "native/export.json").is_file()
    assert "image/png" in plot.outputs[-1].data
    assert "error: top_p (2.0)" in wrong.outputs[0].text
    assert not [name for name, text in printed.items() if "Traceback" in text or "Warning" in text]
