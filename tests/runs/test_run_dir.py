import json
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
