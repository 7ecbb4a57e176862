"""TrainingRun: peak FLOP/s, MFU and the estimate of the final seconds."""

import json
import shutil
from contextlib import closing

import pytest
from training.helpers import (
    read_series,
)

from tinystories_slm.hardware.peak import PeakFlops
from tinystories_slm.training import run as run_module
from tinystories_slm.training import train
from tinystories_slm.training.run import start_run


def test_peak_below_the_achieved_flops_is_measured_again(tiny_run, monkeypatch):
    peaks = iter([PeakFlops(1.0, "measured: on a busy machine")])
    monkeypatch.setattr(
        run_module, "peak_flops", lambda *_: next(peaks, PeakFlops(1e15, "measured: on an idle machine"))
    )
    run_dir = train(tiny_run())

    assert all(0 < share <= 1 for share in read_series(run_dir, "train/mfu").values())
    assert json.loads((run_dir / "environment.json").read_text())["peak_flops_per_second"] == 1e15


def test_mfu_neither_measures_nor_writes(tiny_run, monkeypatch):
    with closing(start_run(tiny_run())) as run:
        run.peak_flops = PeakFlops(1.0, "measured: far too low")
        monkeypatch.setattr(run_module, "peak_flops", lambda *_: pytest.fail("measures"))
        monkeypatch.setattr(run_module, "write_environment", lambda *_: pytest.fail("writes"))
        assert run.mfu(1.0) > 1.0
        assert run.peak_flops.flops_per_second == 1.0


def test_final_seconds_are_estimated_before_the_first_evaluation(tiny_run):
    run = start_run(tiny_run())
    run.seconds_per_token = 3.0
    assert (
        run.estimated_final_seconds == sum(map(len, run.validation)) > 0
    )  # forward only, a third of training
    run.progress.evaluation_seconds, run.progress.saving_seconds = 2.0, 0.5
    assert run.estimated_final_seconds == 2.5
    run.close()


def test_resumed_run_keeps_the_estimate_of_its_final_seconds(tiny_run):
    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    run = start_run(tiny_run())
    run.close()
    assert run.progress.evaluation_seconds > 0 and run.progress.saving_seconds > 0
    assert run.estimated_final_seconds == run.progress.evaluation_seconds + run.progress.saving_seconds
