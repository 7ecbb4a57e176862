import subprocess
import sys

import pytest
from conftest import ROOT
from measuring import Spread
from step_profile import merged
from train import NANOGPT, SHAPES, _ratios, main

WITHOUT_DATASETS = "import sys; sys.modules['datasets'] = None; sys.modules['evaluate'] = None; "


def test_a_step_is_profiled_without_datasets():
    # As on a machine with a GPU and nothing but torch and transformers; the CPU stands in for it.
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


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="training would run on cpu here"):
        main(["--device", "cuda", "--quick"])


def test_kernels_that_overlap_count_once():
    assert list(merged([(5, 7), (0, 2), (1, 3), (6, 6.5)])) == [(0, 3), (5, 7)]
    assert list(merged([])) == []


def test_the_faster_setting_of_a_peer_counts():
    def row(speeds, peak):
        return {"tokens_per_second": Spread.of(speeds), "peak_bytes": Spread.of([peak] * 2)}

    rows = {
        "ours, gpt": row([10, 12], 100),
        "GPT2LMHeadModel, eager": row([5, 4], 300),
        "GPT2LMHeadModel, compiled": row([2, 2], 200),
        NANOGPT: row([1, 2], 400),
    }
    ratios = _ratios(rows)
    assert set(ratios) == {"ours, gpt / GPT2LMHeadModel, eager", f"ours, gpt / {NANOGPT}"}
    assert ratios["ours, gpt / GPT2LMHeadModel, eager"]["speed"].values == [2, 3]
    assert ratios[f"ours, gpt / {NANOGPT}"]["memory"].median == 0.25


def test_the_shapes_are_those_of_the_issue():
    # 6 N + 12 L H Q T by hand: blocks 12 L C^2, head V C.
    nine = 6 * (12 * 8 * 256**2 + 10_000 * 256) + 12 * 8 * 256 * 256
    assert SHAPES["9m"].flops_per_token("gpt") == nine
    assert SHAPES["9m"].tokens_per_step == 16 * 256
    assert SHAPES["30m"].tokens_per_step == 2048
