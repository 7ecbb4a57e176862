"""docs/checkpoints.md and docs/inspect.md: their commands run as they stand."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from tinystories_slm.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def run_page(name: str, work: Path) -> list[str]:
    """Run the commands of a page and return what each one printed."""
    [commands] = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    outputs = []
    for line in commands.splitlines():
        program, script, *args = shlex.split(line)
        assert program == "python"
        if script.startswith("scripts/train.py"):
            args.append("--train.eval_stories=4")
        done = run_script(Path(script).name, *args, cwd=work)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        outputs.append(done.stdout)
    return outputs


def test_commands_about_checkpoints_run(work):
    *_, listed = run_page("checkpoints.md", work)
    run, branch = RunDir(work / "runs/debug"), RunDir(work / "runs/branch")
    assert list(run.kept_steps()) == [0, 1, 2, 4, 8, 10, 16]
    assert list(branch.kept_steps()) == [0, 1, 2, 4, 8, 10]
    assert "branch step16: " in listed and "nothing was uploaded" in listed


def test_commands_about_inspection_run(work):
    _, step, story, text, surprisal, _, exposure, _ = run_page("inspect.md", work)
    assert step.startswith("step 20: 8 windows with text of ")
    assert json.loads((work / "step20.json").read_text())["windows"][7]["text"] in step
    assert re.match(r"story 12: .*\nread by (no step|step [\d, ]+) of 20 steps", story)
    assert 1 <= text.count("read by ") <= 3  # of 400 stories
    assert "of 20 stories" in surprisal and (work / "surprisal.story3.html").is_file()
    assert "20 copies, 1,000 fillings (10.0 bits)" in exposure
    assert json.loads((work / "runs/canaries/exposure.json").read_text())["steps"][-1]["step"] == 20
