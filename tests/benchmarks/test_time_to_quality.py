from types import SimpleNamespace

import nanogpt
import pytest
import time_to_quality
from harness import ProcessResult, fill_table, read_result
from nanogpt import Iteration
from time_to_quality import CHECKPOINTS, draw, iterations_between, training_seconds


def printed(step_s: float, number: int, *, startup_s: float, every: int, eval_s: float) -> list[Iteration]:
    """Return the iterations that nanoGPT prints if a step takes `step_s` and an evaluation `eval_s` more."""
    at_s, lines = startup_s, []
    for i in range(number):
        took = step_s + eval_s * (i % every == 0)
        at_s += took
        lines.append(Iteration(i, 2.0, took, at_s))
    return lines


def test_evaluation_time_is_subtracted():
    lines = printed(0.5, 41, startup_s=4.0, every=10, eval_s=3.0)
    finished_at = training_seconds(lines, every=10)
    assert [finished_at[n] for n in (10, 20, 40)] == pytest.approx([9.0, 14.0, 24.0])


def test_nanogpt_cosine_ends_on_time():
    probe = printed(0.5, 12, startup_s=4.0, every=10**6, eval_s=1.0)
    every = iterations_between(probe, seconds=600.0)
    run = printed(0.5, every * CHECKPOINTS + 1, startup_s=5.0, every=every, eval_s=1.0)
    assert training_seconds(run, every)[every * CHECKPOINTS] == pytest.approx(600.0, abs=5.0)


def test_peer_without_git_history_keeps_its_measurements(tmp_path, monkeypatch):
    (tmp_path / "nanoGPT").mkdir()  # a source archive

    def train(checkout, dataset, options, *, watch=lambda line: None):
        options["out_dir"].mkdir(exist_ok=True)
        (options["out_dir"] / "ckpt.pt").write_bytes(b"")
        lines = [
            nanogpt.Line(f"iter {number}: loss 2.0, time 1000.00ms", 1.0 + number)
            for number in range(options["max_iters"] + 1)
        ]
        for line in lines:
            watch(line)
        return ProcessResult(lines, 1.0, 1)

    monkeypatch.setattr(nanogpt, "train", train)
    monkeypatch.setattr(nanogpt, "load_checkpoint", lambda path: None)
    figures = {"bits_per_byte": 1.18, "held_out": {"num_stories": 1}}
    monkeypatch.setattr(time_to_quality, "score", lambda *args: figures)
    args = SimpleNamespace(data="builtin", nanogpt=tmp_path / "nanoGPT", peer_minutes=20 / 60, stories=1)
    result = time_to_quality.run_nanogpt(args, time_to_quality.RECIPE, 512, 400, tmp_path)

    assert result["revision"] == "unknown"
    assert [point["bits_per_byte"] for point in result["curve"]] == [1.18] * CHECKPOINTS


def test_stored_result_gives_the_table_and_chart_of_the_docs(tmp_path):
    result = read_result("time_to_quality")
    page = tmp_path / "speed.md"
    text = time_to_quality.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    fill_table(page, "benchmarks/time_to_quality.py", time_to_quality._format_table(result))
    assert page.read_text(encoding="utf-8") == text
    draw(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
