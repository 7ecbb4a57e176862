import subprocess
import sys

import pytest
from conftest import ROOT
from harness import Stats, read_result
from step_profile import merge_intervals
from train import NANOGPT, SHAPES, _ratios, draw, main

WITHOUT_DATASETS = "import sys; sys.modules['datasets'] = None; sys.modules['evaluate'] = None; "


def test_step_is_profiled_without_datasets():
    # A GPU machine may have only torch and transformers; the CPU stands in for the GPU.
    program = f"{WITHOUT_DATASETS}sys.path.insert(0, 'benchmarks'); import train; train.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--profile", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[2] for row in rows] == ["2", "4"]
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)


def test_missing_gpu_is_an_error():
    with pytest.raises(SystemExit, match="training would run on cpu here"):
        main(["--device", "cuda", "--quick"])


def test_overlapping_kernels_count_once():
    assert list(merge_intervals([(5, 7), (0, 2), (1, 3), (6, 6.5)])) == [(0, 3), (5, 7)]
    assert list(merge_intervals([])) == []


def test_faster_setting_of_a_peer_counts():
    def row(speeds, peak):
        return {"tokens_per_second": Stats.of(speeds), "peak_bytes": Stats.of([peak] * 2)}

    rows = {
        "ours, gpt2": row([10, 12], 100),
        "GPT2LMHeadModel, eager": row([5, 4], 300),
        "GPT2LMHeadModel, compiled": row([2, 2], 200),
        NANOGPT: row([1, 2], 400),
    }
    ratios = _ratios(rows)
    assert set(ratios) == {"ours, gpt2 / GPT2LMHeadModel, eager", f"ours, gpt2 / {NANOGPT}"}
    assert ratios["ours, gpt2 / GPT2LMHeadModel, eager"]["speed"].values == [2, 3]
    assert ratios[f"ours, gpt2 / {NANOGPT}"]["memory"].median == 0.25


def test_shapes_have_the_expected_flops_and_tokens():
    # 6 N + 12 L H Q T by hand: blocks 12 L C^2, head V C.
    nine = 6 * (12 * 8 * 256**2 + 10_000 * 256) + 12 * 8 * 256 * 256
    assert SHAPES["9m"].flops_per_token("gpt2") == nine
    assert SHAPES["9m"].tokens_per_step == 16 * 256
    assert SHAPES["30m"].tokens_per_step == 2048


def test_stored_result_is_drawn(tmp_path):
    draw(read_result("train"), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
