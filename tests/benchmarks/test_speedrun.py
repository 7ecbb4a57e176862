"""The speedrun: an entry is made and verified, and each way in which it breaks a rule gives one line."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_model
from speedrun import editions, records
from speedrun import run as speedrun_run
from speedrun import verify as speedrun_verify
from speedrun.editions import json_lines, load_edition
from speedrun.entry import (
    Results,
    p_value,
    read_entry,
    read_log,
    student_below,
    summarize,
    write_entry,
)
from speedrun.isolation import landlock_version

from tinystories_slm.config import parse_config
from tinystories_slm.errors import UserError
from tinystories_slm.grammar import generate_corpus
from tinystories_slm.model_folder import save_model_folder

SPEEDRUN = ROOT / "benchmarks" / "speedrun"
README = (SPEEDRUN / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python benchmarks/speedrun/.*$", README, re.MULTILINE)
needs_landlock = pytest.mark.skipif(not landlock_version(), reason="needs Linux with Landlock")

PROGRAM = """
import json, shutil, sys
stories = open("train.jsonl").readlines()
print(len(stories), "stories")
shutil.copytree(f"prebuilt/{sys.argv[1]}", "run/last")
with open("run/metrics.jsonl", "w") as file:
    for step in (1, 2, 5):
        line = {"step": step, "tokens": 64 * step, "seconds": 0.001 * step}
        print(json.dumps(line), file=file)
"""


def write_edition(folder: Path, target: float) -> None:
    texts = {}
    for split, seed, number in (("train", 0, 5), ("validation", 1, 6)):
        data = json_lines(list(generate_corpus(number, seed=seed)))
        texts[split] = {"num_stories": number, "sha256": editions.hashlib.sha256(data).hexdigest()}
    values = {"source": "builtin", **texts, "target": target, "above_entropy": True}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> Path:
    """A folder with the edition `tiny` and an entry, made by the first command of README.md."""
    folder = tmp_path_factory.mktemp("speedrun")
    entry = folder / "entries" / "copy"
    (entry / "prebuilt").mkdir(parents=True)
    for seed in range(3):
        model = tiny_model(seed=seed, vocab_size=len(tokenizer), scale=0.5)
        save_model_folder(model, tokenizer, entry / "prebuilt" / str(seed))
    (entry / "train.py").write_text(PROGRAM)
    template = (SPEEDRUN / "template" / "entry.yaml").read_text()
    values = yaml.safe_load(template) | {"edition": "tiny", "command": "python train.py SEED"}
    (entry / "entry.yaml").write_text(yaml.safe_dump(values))
    write_edition(folder, 100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editions, "FOLDER", folder)
        speedrun_run.main(arguments(0, entry))
        mean = read_entry(entry).results.distance
        write_edition(folder, mean + 1.0)
        refresh_results(entry)
    return folder


def arguments(command: int, entry: Path) -> list[str]:
    """Return the arguments of a command of README.md for this entry."""
    return [word if "NAME" not in word else str(entry) for word in shlex.split(COMMANDS[command])[2:]]


def refresh_results(path: Path) -> None:
    entry = read_entry(path)
    logs = [read_log(entry.log(seed)) for seed in entry.seeds]
    write_entry(replace(entry, results=summarize(load_edition(entry.edition), logs)))


@pytest.fixture
def entry(made, tmp_path, monkeypatch) -> Path:
    """A copy of the entry and of its edition."""
    shutil.copytree(made, tmp_path / "speedrun")
    monkeypatch.setattr(editions, "FOLDER", tmp_path / "speedrun")
    return tmp_path / "speedrun" / "entries" / "copy"


@needs_landlock
def test_made_entry_verifies_with_scores_and_a_rerun(entry, capsys):
    speedrun_verify.main([*arguments(1, entry), "--rerun", "1"])
    printed = capsys.readouterr().out
    assert "3 logs are consistent" in printed and "scores of 3 of 3 models repeated" in printed
    assert "seed 1 again" in printed

    log = read_log(entry / "seed_2.json")
    assert log.seed == 2 and log.steps == [[1, 64, 0.001], [2, 128, 0.002], [5, 320, 0.005]]
    assert [text for _, text in log.lines] == ["5 stories"] and 0 < log.lines[0][0] <= log.seconds
    assert str(entry.parent) not in (entry / "seed_2.json").read_text()
    found = read_entry(entry)
    assert found.commit and found.date and "cores of" in found.hardware
    assert found.results.p_value < 0.01


def change_log(entry: Path, *, seed: int = 1, **changes) -> None:
    """Write a log with changes, its sum and the results of the entry corrected."""
    path = entry / f"seed_{seed}.json"
    log = read_log(path)
    replace(log, **changes).write(path)
    refresh_results(entry)


def lower_seconds(entry: Path) -> None:
    path = entry / "seed_1.json"
    path.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 0.0', path.read_text()))


def lower_score(entry: Path) -> None:
    scores = dict(read_log(entry / "seed_1.json").scores)
    change_log(entry, scores=scores | {"bits_per_byte": scores["bits_per_byte"] - 0.01})


def lower_target(entry: Path) -> None:
    write_edition(editions.FOLDER, read_entry(entry).results.distance + 1e-4)
    refresh_results(entry)


def change_results(entry: Path) -> None:
    found = read_entry(entry)
    write_entry(replace(found, results=replace(found.results, seconds=0.01)))


TAMPERED = {
    "seconds": (lower_seconds, r"seed_1.json: its sum does not match its contents; run the seed again"),
    "seconds with sum": (lambda e: change_log(e, seconds=0.0), "the times of its lines do not rise"),
    "times": (lambda e: change_log(e, lines=[[0.2, "a"], [0.1, "b"]]), "the times of its lines do not rise"),
    "steps": (lambda e: change_log(e, steps=[[2, 64, 0.0], [1, 128, 0.0]]), "its steps, tokens and seconds"),
    "tokens": (lambda e: change_log(e, steps=[[1, 64, 0.0], [3, 65, 0.0]]), "its steps, tokens and seconds"),
    "training text": (lambda e: change_log(e, train_sha256="0"), "its training text is not that of the"),
    "validation": (lambda e: change_log(e, validation_sha256="0"), "its validation text is not that of the"),
    "command": (lambda e: change_log(e, command="python SEED"), "its command is not that of entry.yaml"),
    "files": (lambda e: (e / "train.py").write_text("pass"), "the files of the entry have changed since"),
    "no log": (lambda e: (e / "seed_0.json").unlink(), "seed_0.json is not a log of a run"),
    "seed": (
        lambda e: shutil.copy(e / "seed_0.json", e / "seed_1.json"),
        r"seed_1.json: is of seed 0; run the seed again",
    ),
    "score": (lower_score, r"models/seed_1: scores [\d.]+ bits per byte, and the log has"),
    "weights": (
        lambda e: shutil.copytree(e / "prebuilt" / "0", e / "models" / "seed_1", dirs_exist_ok=True),
        "models/seed_1: has other weights than those of the log",
    ),
    "seeds": (
        lambda e: (write_entry(replace(read_entry(e), seeds=[0, 1])), refresh_results(e)),
        "has 2 seeds; the rules need at least 3",
    ),
    "results": (change_results, "the results of entry.yaml are not those of its logs"),
    "mean": (lower_target, r"the mean is not below the target of [\d.]+ with p < 0.01: mean"),
}  # fmt: skip


@needs_landlock
@pytest.mark.parametrize("tamper", TAMPERED)
def test_tampered_entry_fails_with_one_line(tamper, entry, capsys):
    change, message = TAMPERED[tamper]
    change(entry)
    with pytest.raises(SystemExit) as ended:
        speedrun_verify.main(arguments(1, entry))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line


@needs_landlock
@pytest.mark.parametrize(
    "attempt",
    ["open({path!r}).read()", "__import__('socket').create_connection(('127.0.0.1', {port}), 1)"],
)
def test_run_cannot_read_the_validation_text(attempt, entry, tmp_path):
    stories = tmp_path / "stories"
    stories.mkdir()
    for split, seed, number in (("train", 0, 5), ("validation", 1, 6)):
        (stories / f"{split}.jsonl").write_bytes(json_lines(list(generate_corpus(number, seed=seed))))
    values = yaml.safe_load((editions.FOLDER / "tiny.yaml").read_text()) | {"source": "files"}
    (editions.FOLDER / "tiny.yaml").write_text(yaml.safe_dump(values))
    with __import__("socket").create_server(("127.0.0.1", 0)) as server:
        line = attempt.format(path=str(stories / "validation.jsonl"), port=server.getsockname()[1])
        before = {path: path.read_bytes() for path in entry.glob("seed_*.json")}
        (entry / "train.py").write_text(f"{line}\n{PROGRAM}")
        with pytest.raises(UserError, match=r"command \(python train.py SEED\): failed.*PermissionError"):
            speedrun_run.make_entry(entry, str(stories))
    assert {path: path.read_bytes() for path in entry.glob("seed_*.json")} == before


@needs_landlock
@pytest.mark.parametrize("is_link", [False, True], ids=["path", "link"])
def test_model_from_outside_the_run_is_rejected(entry, is_link):
    elsewhere = entry / "prebuilt" / "0"
    if is_link:
        path = elsewhere / "model.safetensors"
        line = f"import os; os.makedirs('out'); os.symlink({str(path)!r}, 'out/model.safetensors')\n"
        (entry / "train.py").write_text(line)
        write_entry(replace(read_entry(entry), model="out", metrics=None))
    else:
        write_entry(replace(read_entry(entry), model=str(elsewhere)))
    with pytest.raises(UserError, match=r"model \(.*\): .* is outside the folder of the run"):
        speedrun_run.make_entry(entry, None, only=0)


@needs_landlock
def test_run_has_a_folder_and_environment_of_its_own(entry, monkeypatch):
    monkeypatch.setenv("STORIES", "validation.jsonl")
    (entry / "train.py").write_text(
        "import os\nprint(sorted(os.listdir()), 'STORIES' in os.environ, len(os.sched_getaffinity(0)))\n"
        + PROGRAM
    )
    speedrun_run.make_entry(entry, None, only=0)
    _, printed = read_log(entry / "seed_0.json").lines[0]
    assert printed.startswith("['.home', 'prebuilt', 'train.jsonl', 'train.py'] False ")
    assert int(printed.split()[-1]) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edition": "none"}, r"edition \(none\): must be one of tiny"),
        ({"colour": 1}, "entry.yaml is not an entry .*colour"),
        ({"device": "tpu"}, r"device \(tpu\): must be cpu or gpu"),
        ({"command": "python train.py"}, "the command must have the word SEED"),
        ({"command": "python missing.py SEED"}, "failed with seed 0: .*missing.py"),
        ({"model": "none"}, r"model \(none\): the command wrote no such folder"),
    ],
)
@needs_landlock
def test_invalid_entry_is_rejected(change, message, entry):
    values = yaml.safe_load((entry / "entry.yaml").read_text()) | change
    (entry / "entry.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message):
        speedrun_run.make_entry(entry, None)


def test_other_text_is_rejected(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(json_lines(["a", "b"]))
    with pytest.raises(UserError, match=r"data \(.*\): the first 20,593 stories of train have the SHA-256 "):
        load_edition("tinystories").read_stories("train", str(tmp_path))
    with pytest.raises(
        UserError, match=r"data \(null\): the edition tinystories needs its stories; set --data"
    ):
        load_edition("tinystories").read_stories("train", None)


def test_p_value_is_that_of_the_tables_of_students_t():
    assert student_below(-2.920, 2) == pytest.approx(0.05, abs=1e-4)
    assert student_below(-6.965, 2) == pytest.approx(0.01, abs=1e-4)
    assert student_below(2.015, 5) == pytest.approx(0.95, abs=1e-4)
    assert p_value([0.9, 1.0, 1.1], 1.0) == pytest.approx(0.5)
    assert p_value([1.0], 2.0) == 1.0 and p_value([1.0, 1.0], 2.0) == 0.0


def test_text_of_the_builtin_edition_has_its_hash():
    assert len(load_edition("builtin").read_stories("validation", None)) == 1000


@pytest.mark.slow
def test_training_text_of_the_builtin_edition_has_its_hash():
    assert len(load_edition("builtin").read_stories("train", None)) == 20_000


def test_template_is_an_entry():
    template = read_entry(SPEEDRUN / "template")
    load_edition(template.edition)
    config = parse_config([f"--config={SPEEDRUN / 'template' / 'config.yaml'}"])
    assert (config.data.source, str(config.output_dir / "last")) == (speedrun_run.TRAIN_FILE, template.model)


@pytest.mark.parametrize(
    "path", sorted((SPEEDRUN / "entries").glob("*/entry.yaml")), ids=lambda p: p.parent.name
)
def test_published_entry_verifies(path):
    assert isinstance(speedrun_verify.verify(path.parent).results, Results)


def test_page_of_records_is_that_of_the_entries():
    found = records.read_entries(SPEEDRUN / "entries")
    assert (SPEEDRUN / "RECORDS.md").read_text(encoding="utf-8") == records.format_page(found)


@needs_landlock
def test_records_are_a_table_and_a_picture(entry, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", editions.FOLDER)
    monkeypatch.setattr(records, "EDITIONS", editions.FOLDER)
    assert COMMANDS[2].endswith("records.py")
    records.main()
    page = (editions.FOLDER / "RECORDS.md").read_text()
    results = read_entry(entry).results
    assert f"| {results.seconds:.1f} | {results.bits_per_byte:.4f} |" in page
    assert "[what is new in a few words](entries/copy/entry.yaml)" in page
    assert (editions.FOLDER / "records.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((entry / "seed_0.json").read_text())["sum"]
