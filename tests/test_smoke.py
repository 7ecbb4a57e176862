"""Every script once, in the order of the README, on the smallest configuration.

`make test-lowest` runs this with the lowest versions that setup.cfg allows.
"""

import json

import pytest
from conftest import run_script


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


def test_scripts_from_configuration_to_dry_push(work):
    run, best = work / "run", str(work / "run" / "best")
    flags = ["--config=configs/debug.yaml", f"--output_dir={run}", f"--data.data_dir={work / 'data'}"]
    train = ["train.py", *flags, "--train.max_steps=6", "--train.save_every=3", "--train.eval_every=3"]
    commands = [
        ["doctor.py", *flags],
        ["download_data.py", *flags],
        ["train_tokenizer.py", *flags],
        ["prepare_data.py", *flags],
        train,
        train,  # resumes, and finds the run at its end
        [
            "evaluate.py",
            f"--model={best}",
            "--data=builtin",
            "--max_stories=4",
            f"--output={run / 'evaluation.json'}",
        ],
        ["generate.py", f"--model={best}", "--max_new_tokens=12", f"--output={run / 'stories.jsonl'}"],
        ["doctor.py", f"--model={best}"],
        ["export.py", f"--model={best}", "--format=custom", f"--output={work / 'custom'}"],
        ["export.py", f"--model={best}", "--format=native", f"--output={work / 'native'}"],
        ["generate.py", f"--model={work / 'native'}", "--max_new_tokens=12", "--seed=1"],
        ["report.py", f"--run={run}"],
        ["push_to_hub.py", f"--run={run}", "--repo_id=tester/tales", "--dry_run"],
    ]
    printed = {}
    for name, *args in commands:
        done = run_script(name, *args)
        assert done.returncode == 0, f"{name} {args}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr and "FutureWarning" not in done.stderr, done.stderr
        printed[name, *args] = done.stdout + done.stderr

    evaluation = json.loads((run / "evaluation.json").read_text())
    assert 4 < evaluation["loss"] < 7 and evaluation["num_stories"] == 4
    assert "0 problems" in printed["doctor.py", f"--model={best}"]
    assert (
        "nothing was uploaded"
        in printed["push_to_hub.py", f"--run={run}", "--repo_id=tester/tales", "--dry_run"]
    )
