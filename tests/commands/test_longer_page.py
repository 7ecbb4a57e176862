"""docs/longer.md: its commands run as they stand."""

import re
import shlex

from conftest import ROOT, run_script

from tinystories_slm.runs.run_dir import RunDir


def test_commands_of_the_page_extend_a_run(tmp_path):
    [block] = re.findall(
        r"```bash\n(.*?)```", (ROOT / "docs/longer.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for command in block.splitlines():
        _, script, *flags = shlex.split(command)
        done = run_script(script.removeprefix("scripts/"), *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    assert "extended from step 16, before the decay of a run that ended at step 20" in done.stderr
    assert "run complete: all 40 steps" in done.stderr
    assert len(RunDir(tmp_path / "runs/longer").read_extensions()) == 1
