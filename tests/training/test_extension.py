"""Extension: a finished run is trained on, and equals the run that was planned that long."""

import contextlib
import json
import re
import shutil
import signal

import pytest
import torch
from training.helpers import assert_same_run, load_weights, read_series, train_with_stops

from tinystories_slm.config import load_config
from tinystories_slm.doctor.resources import check_disk, check_run_dir
from tinystories_slm.errors import UserError
from tinystories_slm.hub.card import write_card
from tinystories_slm.runs.report import write_report
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training import extension, is_finished, train
from tinystories_slm.training.checkpoints import checkpoints, read_progress
from tinystories_slm.training.extension import find_extension

WSD = ("--train.schedule", "wsd", "--train.decay_fraction", "0.4", "--train.eval_every", "5")
COSINE = ("--train.min_lr_rate", "0.1")
EXTEND = ("--train.resume", "extend")
VARIANTS = {
    "AdamW, dropout": ("--model.dropout", "0.2", "--train.log_every", "3"),
    "Muon, EMA": ("--train.optimizer", "muon", "--train.ema_decay", "0.9", "--train.keep", "newest:1"),
}


def steps(number: int) -> tuple[str, str]:
    return "--train.max_steps", str(number)


def saved_steps(run_dir) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoints(run_dir)]


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_run_extended_twice_equals_the_run_planned_that_long(flags, tiny_run, monkeypatch):
    flags = (*WSD, *flags)
    planned = train(tiny_run(*flags, *steps(45), name="planned"))
    run_dir = train(tiny_run(*flags, *steps(12)))
    assert read_progress(checkpoints(run_dir)[-1]).decay_step == 8
    assert 8 in saved_steps(run_dir)

    extended = tiny_run(*flags, *steps(22), *EXTEND)
    train_with_stops(extended, monkeypatch, {10: signal.SIGTERM})  # the same command resumes
    assert is_finished(extended)
    train(tiny_run(*flags, *steps(45), *EXTEND))

    assert_same_run(run_dir, planned)
    assert load_config(run_dir / "config.yaml").train.max_steps == 45
    assert [(one["from_step"], one["end_step"]) for one in RunDir(run_dir).read_extensions()] == [
        (8, 12), (14, 22),
    ]  # fmt: skip
    assert read_progress(checkpoints(run_dir)[-1]).extended_steps == [8, 14]
    assert saved_steps(run_dir) == saved_steps(planned)


def test_best_of_the_finished_run_stays_until_a_better_one(tiny_run, monkeypatch):
    run_dir = train(tiny_run(*WSD))
    before = (run_dir / "best/model.safetensors").read_bytes()
    losses = iter([9.0, 0.5])
    monkeypatch.setattr("tinystories_slm.training.loop.validation_loss", lambda *_: next(losses))
    extended = tiny_run(*WSD, *steps(20), *EXTEND, "--train.eval_every", "15")
    monkeypatch.setattr(
        "tinystories_slm.training.loop.save_model_folder", lambda *_: pytest.fail("saved"), raising=True
    )
    with pytest.raises(pytest.fail.Exception):  # at the first save of last/, after an evaluation of 9.0
        train(extended)
    assert (run_dir / "best/model.safetensors").read_bytes() == before


def test_run_without_a_constant_part_warms_up_again(tiny_run):
    run_dir = train(tiny_run(*COSINE))
    last = load_weights(run_dir / "last")
    config = tiny_run(*COSINE, *steps(24), *EXTEND, "--train.rewarm_lr_rate", "0.6")
    train(config)

    rates = read_series(run_dir, "train/lr")
    assert sorted(rates) == list(range(1, 25))
    peak = max(rates.values())
    assert rates[12] == pytest.approx(0.1 * peak)
    assert [rates[13], rates[14]] == pytest.approx([0.35 * peak, 0.6 * peak])  # two steps of warm-up
    assert rates[24] == pytest.approx(0.1 * peak)
    assert all(rates[step] > rates[step + 1] for step in range(14, 24))
    assert any((last[name] != weights).any() for name, weights in load_weights(run_dir / "last").items())
    assert RunDir(run_dir).read_extensions()[0]["rewarm_lr_rate"] == 0.6

    train(tiny_run(*COSINE, *steps(36), *EXTEND, "--train.rewarm_lr_rate", "0.6"))
    assert read_progress(checkpoints(run_dir)[-1]).extended_steps == [12, 24]
    assert read_series(run_dir, "train/lr")[26] == pytest.approx(0.6 * peak)


def test_rewarmed_run_that_is_stopped_is_bit_identical(tiny_run, monkeypatch):
    for name in ("whole", "pieces"):
        train(tiny_run(*COSINE, name=name))
    whole = train(tiny_run(*COSINE, *steps(24), *EXTEND, name="whole"))
    pieces = train_with_stops(
        tiny_run(*COSINE, *steps(24), *EXTEND, name="pieces"), monkeypatch, {17: signal.SIGTERM}
    )
    assert_same_run(whole, pieces)


REJECTED = {
    "no run": ((), (), r"train.resume \(extend\): must find a finished run in output_dir"),
    "another configuration": (
        WSD,
        ("--train.lr", "0.5"),
        r"another configuration: train.lr was 0.01 and",
    ),
    "fewer steps": (
        WSD,
        steps(11),
        r"train.max_steps \(11\): must be above the 12 steps of the finished",
    ),
    "no time left": (
        WSD,
        (*steps(20), "--train.max_minutes", "0.0001"),
        r"train.max_minutes \(0.0001\): must be above the [\d.]+ minutes of the finished run",
    ),
    "no step after the warm-up": (COSINE, steps(14), r"above the 12 steps .* and the 2 of the warm-up; set"),
}


@pytest.mark.parametrize(("trained", "flags", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_extension_that_is_not_possible_changes_nothing(trained, flags, message, tiny_run, tmp_path):
    if trained:
        train(tiny_run(*trained))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        train(tiny_run(*trained, *flags, *EXTEND))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_unfinished_run_is_not_extended(tiny_run):
    run_dir = train(tiny_run(*WSD))
    shutil.rmtree(run_dir / "checkpoints/step_000012")
    with pytest.raises(UserError, match=r"must be finished first, and is at step 8 of 12; run its own"):
        train(tiny_run(*WSD, *steps(20), *EXTEND))


def test_missing_or_damaged_checkpoint_before_the_decay_raises(tiny_run):
    run_dir = train(tiny_run(*WSD))
    extended = tiny_run(*WSD, *steps(20), *EXTEND)
    weights = run_dir / "checkpoints/step_000008/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"before the decay \(step_000008\) .* has another checksum"):
        train(extended)
    shutil.rmtree(weights.parent)
    with pytest.raises(UserError, match=r"\(step_000008\) in .* must be intact, but it is missing; start"):
        train(extended)


def test_another_length_without_the_option_names_it(tiny_run):
    train(tiny_run(*WSD))
    with pytest.raises(UserError, match=r"max_steps was 12 and is 20; .*--train.resume extend"):
        train(tiny_run(*WSD, *steps(20)))


@pytest.mark.parametrize("flags", [WSD, COSINE], ids=["constant part", "re-warmed"])
@pytest.mark.parametrize("call", ["rewrite_progress", "remove_directory", "save_config"])
def test_kill_at_any_point_of_an_extension_is_repaired(call, flags, tiny_run, monkeypatch):
    whole = train(tiny_run(*flags, name="whole"))
    train(tiny_run(*flags, *steps(24), *EXTEND, name="whole"))
    run_dir = train(tiny_run(*flags))
    with monkeypatch.context() as patch:
        patch.setattr(extension, call, lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
        kept = call == "remove_directory" and flags == COSINE  # nothing is removed there
        with contextlib.nullcontext() if kept else pytest.raises(SystemExit):
            train(tiny_run(*flags, *steps(24), *EXTEND))
    train(tiny_run(*flags, *steps(24), *EXTEND))

    assert_same_run(run_dir, whole)
    assert len(RunDir(run_dir).read_extensions()) == 1
    assert len(read_progress(checkpoints(run_dir)[-1]).extended_steps) == 1


def test_extended_run_with_a_time_limit_counts_from_the_checkpoint(tiny_run, monkeypatch):
    monkeypatch.setattr(
        "tinystories_slm.training.run.TrainingRun.seconds",
        property(lambda run: float(run.progress.step)),  # one second per step
    )
    monkeypatch.setattr(
        "tinystories_slm.training.run.TrainingRun.estimated_final_seconds", property(lambda run: 0.0)
    )
    limit = (*WSD, *steps(500), "--train.max_minutes")
    run_dir = train(tiny_run(*limit, "0.2"))
    assert read_progress(checkpoints(run_dir)[-1]).step == 12
    assert read_progress(checkpoints(run_dir)[-1]).decay_step == 9  # 0.6 of the ten seconds after the warm-up
    train(tiny_run(*limit, "0.5", *EXTEND))
    end = read_progress(checkpoints(run_dir)[-1])
    rates = read_series(run_dir, "train/lr")

    assert (end.step, end.decay_step, end.finished) == (30, 19, True)
    assert len({rates[step] for step in range(2, 20)}) == 1


def test_report_card_and_plot_state_the_extension(tiny_run):
    run_dir = train(tiny_run(*WSD))
    train(tiny_run(*WSD, *steps(24), *EXTEND))
    phrase = "extended from step 8, before the decay of a run that ended at step 12"
    report, card = write_report(run_dir).read_text(), write_card(run_dir).read_text()

    assert report.count(phrase) == 1
    assert len(re.findall(r'class="mark"', report)) == 2  # in the wide and in the narrow chart
    curve = re.search(r'data-name="decay before the extension" data-values="(.*?)"', report)
    assert [step for step, _ in json.loads(curve[1].replace("&#34;", '"'))] == [9, 10, 11, 12]
    assert phrase in card


def test_doctor_foretells_the_extension_and_its_checkpoint(tiny_run):
    disk = {
        name: next(check_disk(tiny_run(*flags, "--train.keep", "newest:1"), torch.device("cpu"), "no")).text
        for name, flags in {"wsd": WSD, "linear": (*WSD, "--train.decay_fraction", "1.0")}.items()
    }
    assert disk["wsd"] != disk["linear"]
    train(tiny_run(*WSD))
    config = tiny_run(*WSD, *steps(24), *EXTEND)
    assert find_extension(config) is not None
    [diagnostic] = check_run_dir(config)
    assert diagnostic.verdict == "ok"
    assert "a run would be extended from step_000008" in diagnostic.text
