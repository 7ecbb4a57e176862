"""The scripts of the README as real processes, and the quickstart that runs all steps."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from script_process import run_forked

from tinystories_slm import grammar
from tinystories_slm.commands import run
from tinystories_slm.commands.source_folders import use_own_folders
from tinystories_slm.config import parse_config, save_config
from tinystories_slm.config.command_args.doctor import DoctorArgs
from tinystories_slm.config.command_args.publish import ExportArgs, PushArgs
from tinystories_slm.config.parse import parse


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def config_file(work) -> Path:
    """The debug preset with temporary folders."""
    config = parse_config(
        [
            f"--config={ROOT / 'configs' / 'debug.yaml'}",
            f"--data.data_dir={work / 'data'}",
            f"--output_dir={work / 'run'}",
        ]
    )
    save_config(config, work / "debug.yaml")
    return work / "debug.yaml"


@pytest.fixture(scope="module")
def transcript(work, config_file) -> dict[str, subprocess.CompletedProcess]:
    """Outputs of the README's step-by-step commands by script; preset, dataset and folders are replaced."""
    [block] = [
        block
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "scripts/train.py" in block
    ]
    replacements = {
        "configs/9m.yaml": config_file,
        "runs/9m": work / "run",
        "roneneldan/TinyStories": "builtin",
        "evaluation.json": work / "evaluation.json",
        "scripts/": f"{ROOT / 'scripts'}/",
        "python ": f"{sys.executable} ",
        "accelerate ": f"{sys.executable} -m accelerate.commands.accelerate_cli ",
    }
    done = {}
    for line in block.splitlines():
        if line.startswith("source "):
            continue
        for original, replacement in replacements.items():
            line = line.replace(original, str(replacement))
        command = shlex.split(line, comments=True)
        script = next(Path(part).name for part in command if part.endswith(".py"))
        if command[1].endswith(".py"):
            done[script] = run_forked(command[1:], work)
        else:
            done[script] = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
        assert done[script].returncode == 0, done[script].stderr
    return done


@pytest.fixture(scope="module")
def run_dir(transcript, work) -> Path:
    return work / "run"


@pytest.fixture(scope="module")
def flags(config_file) -> list[str]:
    return ["--config", str(config_file)]


def test_readme_uses_every_script(transcript):
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    tested_elsewhere = {"story.py", "doctor.py", "report.py", "export.py", "push_to_hub.py"}
    tested_elsewhere |= {"data_report.py", "report_card.py", "sweep.py", "scaling.py", "serve.py", "demo.py"}
    tested_elsewhere |= {"inspect_data.py", "surprisal.py", "exposure.py"}
    assert set(transcript) == scripts - tested_elsewhere
    assert "43,168 parameters" in transcript["train.py"].stderr
    assert transcript["generate.py"].stdout.count("Once upon a time") == 3


ARGUMENTS = {"doctor.py": DoctorArgs, "export.py": ExportArgs, "push_to_hub.py": PushArgs}


def test_options_of_the_other_readme_commands_parse():
    # The tests of each command check its behavior. This one checks that the README uses current options.
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    scripts = [command[1:] for command in commands if command[0] == "python"]
    parsed = [
        parse(ARGUMENTS[name], argv) for script, *argv in scripts if (name := Path(script).name) in ARGUMENTS
    ]

    assert len(parsed) == 5


def test_python_code_of_the_readme_runs(run_dir, work):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = code.replace("runs/quickstart/best", str(run_dir / "best")).replace("250", "40")
    (work / "readme.py").write_text(code)
    done = run_forked([work / "readme.py"], work)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")


def test_each_step_writes_its_files(run_dir, work):
    data = work / "data"
    assert {path.name for path in (data / "raw").iterdir()} == {
        "train.parquet", "validation.parquet", "source.json",
    }  # fmt: skip
    manifest = json.loads((data / "manifest.json").read_text())
    assert (data / "train.bin").stat().st_size == 2 * manifest["splits"]["train"]["num_tokens"]
    assert {path.name for path in run_dir.iterdir()} >= {"best", "last", "metrics.jsonl", "loss.png"}


def test_evaluate_writes_metrics_and_the_entropy_of_the_corpus(run_dir, tmp_path):
    output = tmp_path / "evaluation.json"
    args = ["--model", str(run_dir / "best"), "--data", "builtin", "--split", "validation"]
    args += ["--max_stories", "20", "--output", str(output)]
    done = run_script("evaluate.py", *args, "--batch_size", "32")
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    again = run_script("evaluate.py", *args, "--batch_size", "3")
    assert again.returncode == 0, again.stderr

    assert {
        "loss",
        "perplexity",
        "bits_per_byte",
        "accuracy",
        "num_tokens",
        "num_bytes",
        "num_stories",
    } <= set(report)
    assert report["num_stories"] == 20
    assert report["loss"] > report["entropy"] > 0
    assert report["entropy"] * report["num_tokens"] / 20 == pytest.approx(grammar.entropy(), rel=0.05)
    assert "(corpus entropy: " in done.stdout
    found, expected = _leaves(json.loads(output.read_text())), _leaves(report)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value == (
            pytest.approx(expected[name], rel=1e-6) if isinstance(value, float) else expected[name]
        )


def _leaves(value: object, path: tuple = ()) -> dict[tuple, object]:
    """Return the values inside nested lists and objects by their path."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, item in items for place, leaf in _leaves(item, (*path, key)).items()}


def test_evaluate_accepts_a_text_column_of_a_jsonl_file(run_dir, tmp_path):
    stories = tmp_path / "mine.jsonl"
    stories.write_text('{"story": "a"}\n{"story": "Zoë saw 🦊🦊."}\n', encoding="utf-8")
    output = tmp_path / "evaluation.json"
    done = run_script(
        "evaluate.py", "--model", str(run_dir / "last"), "--data", str(stories), "--text_column", "story",
        "--split", "train", "--output", str(output),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())

    assert (report["num_stories"], report["num_bytes"]) == (2, 1 + 18)
    assert "entropy" not in report


def test_evaluate_rejects_an_empty_file(run_dir, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    done = run_script(
        "evaluate.py", "--model", str(run_dir / "last"), "--data", str(empty), "--split", "train"
    )

    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: data.source" in done.stderr and "empty.txt" in done.stderr


def test_second_quickstart_generates_without_training_again(work):
    flags = [
        "--config", str(ROOT / "configs" / "debug.yaml"),
        f"--data.data_dir={work / 'data2'}", f"--output_dir={work / 'run2'}",
    ]  # fmt: skip
    first = run_script("story.py", *flags)
    assert first.returncode == 0, first.stderr
    metrics = (work / "run2" / "metrics.jsonl").read_text()
    stories = (work / "run2" / "stories.jsonl").read_text()
    second = run_script("story.py", *flags)
    assert second.returncode == 0, second.stderr

    for output in (first.stdout, second.stdout):
        for part in ("Once upon a time", "nats per token", "corpus entropy", "bits per byte", "run2", "next"):
            assert part in output
    assert "step 20/20" in first.stderr and "step" not in second.stderr
    assert (work / "run2" / "metrics.jsonl").read_text() == metrics
    assert (work / "run2" / "stories.jsonl").read_text() == stories
    results = [json.loads(line) for line in stories.splitlines()]
    assert [(result["seed"], result["temperature"], result["model"]) for result in results] == [
        (0, 0.3, "run2/best"), (1, 0.3, "run2/best"), (2, 0.3, "run2/best"),
    ]  # fmt: skip
    assert len({result["story"] for result in results}) == 3


def test_quickstart_gives_each_source_use_own_folders():
    def folders(*flags: str) -> tuple[str, str]:
        config = use_own_folders(parse_config([f"--config={ROOT / 'configs' / 'quickstart.yaml'}", *flags]))
        return str(config.data.data_dir), str(config.output_dir)

    assert folders() == ("data/builtin", "runs/quickstart")
    assert folders("--data.source=a/mine.txt") == ("data/a--mine.txt", "runs/a--mine.txt")
    assert folders("--data.source=b/mine.txt") == ("data/b--mine.txt", "runs/b--mine.txt")
    assert folders("--data.source=x/y", "--output_dir=runs/z") == ("data/x--y", "runs/z")
    assert folders("--data.source=x/y", "--data.data_dir=data/z") == ("data/z", "runs/x--y")


NEW_RUN = ["--output_dir", "runs/never-made"]
NEW = [*NEW_RUN, "--data.data_dir", "data/never-made"]


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        (
            "train.py",
            [*NEW, "--data.source", "absent.parquet"],
            "data.source ('absent.parquet') does not exist",
        ),
        (
            "train.py",
            [*NEW_RUN, "--data.source", "absent.txt"],
            "data.source ('absent.txt') does not exist",
        ),
        (
            "train.py",
            ["--tokenizer.vocab_size", "400"],  # the data of a run are not replaced by it
            "holds a run with another configuration: tokenizer.vocab_size was 512 and is 400",
        ),
        ("train.py", ["--model.hidden_size", "64"], "model.hidden_size was 32 and is 64"),
        ("train.py", [*NEW_RUN, "--data.seq_len", "5000000"], "data.seq_len (5000000) is longer than the"),
    ],
)
def test_invalid_input_exits_with_code_2_and_one_line(run_dir, flags, script, args, message):
    done = run_script(script, *flags, "--train.lr", "3e-4", *args)

    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (ROOT / "runs" / "never-made").exists()
    shutil.rmtree(ROOT / "data" / "never-made", ignore_errors=True)


def test_truncated_token_file_is_rejected(work, tmp_path, run_dir):
    data = tmp_path / "data"
    shutil.copytree(work / "data", data)
    with (data / "train.bin").open("r+b") as file:
        file.truncate(1001)
    done = run_script(
        "train.py", "--config", str(ROOT / "configs" / "debug.yaml"),
        f"--data.data_dir={data}", f"--output_dir={tmp_path / 'run'}",
    )  # fmt: skip

    assert done.returncode == 2
    assert "train.bin has 1001 bytes, but manifest.json records" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "absent.parquet"], "does not exist"),
        (["--data", "builtin", "--split", "test"], "test"),
        (["--data", "builtin", "--batch_size", "0"], "batch_size (0) must be at least 1"),
        (["--data", "builtin", "--model", "runs/none"], "runs/none"),
        (["--data", "builtin", "--output", "no/such/folder/x.json"], "create no/such/folder"),
    ],
)
def test_evaluate_rejects_invalid_options_in_one_line(run_dir, args, message):
    done = run_script("evaluate.py", "--model", str(run_dir / "best"), *args)

    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_story_reads_the_quickstart_preset_by_default(capsys):
    with pytest.raises(SystemExit):
        run("story", ["--train.lr=0.5", "--print_config"])
    printed = capsys.readouterr().out
    assert "output_dir: runs/quickstart" in printed and "max_steps: 2100" in printed and "lr: 0.5" in printed

    with pytest.raises(SystemExit):
        run("story", ["--config", str(ROOT / "configs" / "debug.yaml"), "--print_config"])
    assert "max_steps: 2100" not in capsys.readouterr().out


def folders_of(source: str, *flags: str) -> tuple[str, str]:
    preset = f"--config={ROOT / 'configs' / 'quickstart.yaml'}"
    config = use_own_folders(parse_config([preset, f"--data.source={source}", *flags]))
    return str(config.data.data_dir), str(config.output_dir)


def test_each_source_of_the_quickstart_has_folders_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folders_of("builtin") == ("data/builtin", "runs/quickstart")

    sources = [
        *("a/stories.txt", "b/stories.txt", "data/mystories", "x/builtin", "x/quickstart"),
        *("roneneldan/TinyStories", "other/TinyStories", "it's", "$HOME/x", "..", "."),
        *("\udcff", "é" * 300),
    ]
    folders = [folders_of(source) for source in sources]
    assert len(set(folders)) == len({data for data, _ in folders}) == len(sources)
    for source, (data_dir, output_dir) in zip(sources, folders, strict=True):
        assert re.fullmatch(r"data/[^/]{1,160}", data_dir) and data_dir != "data/..", source
        assert output_dir == data_dir.replace("data/", "runs/")
    assert folders[0] == ("data/a--stories.txt", "runs/a--stories.txt")
    assert folders_of("data/mystories/") == folders[2] == ("data/data--mystories", "runs/data--mystories")


def test_stories_of_earlier_versions_are_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "data" / "stories.txt" / "raw"
    raw.mkdir(parents=True)
    (raw / "source.json").write_text('{"source": "a/stories.txt"}')

    assert folders_of("a/stories.txt") == ("data/stories.txt", "runs/stories.txt")
    assert folders_of("b/stories.txt")[0] == "data/b--stories.txt"
