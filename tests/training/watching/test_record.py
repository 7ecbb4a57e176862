import pytest

from tinystories_slm.data import builtin
from tinystories_slm.data.prepare import Manifest
from tinystories_slm.training.watching.record import entropy_per_token, read_metrics, read_samples
from tinystories_slm.training.watching.tracking import RunRecord


def test_stories_read_back_as_they_were_told(tmp_path):
    told = [(10, "One line."), (20, "Two paragraphs.\n\n## step 99\n> quoted\nThe end."), (30, "")]
    record = RunRecord(tmp_path)
    for step, story in told:
        record.sample(story, step=step)
    assert read_samples(record.samples_path) == told
    assert read_samples(tmp_path / "nothing.md") == []


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "trai')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_only_the_built_in_corpus_knows_its_entropy(data_dir):
    manifest = Manifest.load(data_dir / "manifest.json")
    validation = manifest.splits["validation"]
    per_story = entropy_per_token(manifest) * validation["num_tokens"] / validation["num_stories"]
    assert per_story == pytest.approx(builtin.entropy())
    other = Manifest(**{**vars(manifest), "source": "roneneldan/TinyStories"})
    assert entropy_per_token(other) is None
