import json
import os
import shutil

import pytest

from tinystories_slm.config import save_config
from tinystories_slm.errors import UserError
from tinystories_slm.runs.run_dir import RunDir


def test_readers_return_nothing_without_files(tmp_path):
    run_dir = RunDir(tmp_path)
    assert run_dir.load_config() is None and run_dir.load_manifest() is None
    assert run_dir.read_metrics() == run_dir.read_samples() == run_dir.read_stories() == []
    assert run_dir.read_evaluation() == run_dir.read_environment() == {}


def test_readers_return_the_contents_of_the_files(tmp_path, tiny_run, data_dir):
    run_dir = RunDir(tmp_path / "files")
    run_dir.path.mkdir()
    save_config(tiny_run(), run_dir.config)
    shutil.copy(data_dir / "manifest.json", run_dir.manifest)
    run_dir.evaluation.write_text('{"loss": 1.5}')
    run_dir.metrics.write_text('{"step": 1}\n\n{"step": 2}\n')
    assert run_dir.load_config() == tiny_run()
    assert run_dir.load_manifest().vocab_size == 300
    assert run_dir.read_evaluation() == {"loss": 1.5}
    assert run_dir.read_metrics() == [{"step": 1}, {"step": 2}]


def test_stories_may_contain_unicode_line_separators(tmp_path):
    run_dir = RunDir(tmp_path)
    stories = [{"story": "One.\u2028Two.\u0085Three."}, {"story": "Four."}]
    lines = [json.dumps(story, ensure_ascii=False) + "\n" for story in stories]
    run_dir.stories.write_text("".join(lines), encoding="utf-8")
    assert run_dir.read_stories() == stories


@pytest.mark.parametrize("text", ["{", "[1, 2]", "[" * 10**5], ids=["cut", "list", "deep"])
def test_damaged_json_is_a_one_line_error(tmp_path, text):
    run_dir = RunDir(tmp_path)
    run_dir.evaluation.write_text(text)
    with pytest.raises(UserError, match=r"evaluation\.json .*; correct or delete it") as error:
        run_dir.read_evaluation()
    assert "\n" not in str(error.value)


def test_invalid_configuration_is_an_error_with_its_path(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.config.write_text("train:\n  unheard_of: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml cannot be loaded \(unknown option"):
        run_dir.load_config()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluation", {"bits_per_byte": "x"}),
        ("evaluation", {"accuracy": 10**400}),
        ("evaluation", {"weights_sha256": [1]}),
        ("evaluation", {"num_stories": None}),
        ("evaluation", {"data": "\ud800"}),
        ("environment", {"packages": [1]}),
        ("environment", {"peak_flops_per_second": None}),
        ("environment", {"earlier_sessions": [1]}),
    ],
)
def test_values_of_another_type_are_one_line_errors(tmp_path, name, value):
    run_dir = RunDir(tmp_path)
    getattr(run_dir, name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"{name}\.json.*; correct or delete") as error:
        getattr(run_dir, f"read_{name}")()
    assert "\n" not in str(error.value)


def test_metrics_are_the_numbers_of_each_line(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text('{"step": 1, "val/loss": null, "train/lr": 1e400}\n{"step": "x"}\n')
    assert run_dir.read_metrics() == [{"step": 1, "train/lr": float("inf")}]


def test_pipe_among_the_records_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl must be a regular file"):
        RunDir(tmp_path).check_files()
