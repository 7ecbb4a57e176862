from dataclasses import replace

import pytest

from tinystories_slm import grammar
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.runs.recorder import RunRecorder
from tinystories_slm.runs.records import entropy_per_token, read_metrics, read_samples


def test_samples_are_read_as_they_were_logged(tmp_path):
    separators = "A line\u2028and\u2029another\x85one\x0c."  # str.splitlines() splits at each
    paragraphs = "Two paragraphs.\n\n## step 99\n> quoted\nThe end."
    samples = [(10, "One line."), (20, paragraphs), (30, ""), (40, separators)]
    recorder = RunRecorder(tmp_path)
    for step, story in samples:
        recorder.log_sample(story, step=step)
    assert read_samples(recorder.run_dir.samples) == samples
    assert read_samples(tmp_path / "nothing.md") == []


def test_incomplete_last_line_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "trai')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_entropy_is_known_only_for_the_built_in_corpus(data_dir):
    manifest = Manifest.load(data_dir / "manifest.json")
    validation = manifest.splits["validation"]
    per_story = entropy_per_token(manifest) * validation["num_tokens"] / validation["num_stories"]
    assert per_story == pytest.approx(grammar.entropy())
    provenance = replace(manifest.provenance, source="roneneldan/TinyStories")
    other = replace(manifest, provenance=provenance)
    assert entropy_per_token(other) is None
