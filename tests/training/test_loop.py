import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tinystories_slm.config import load_config
from tinystories_slm.errors import InputError
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.training import finished, train
from tinystories_slm.training import run as run_module
from tinystories_slm.training.checkpoints import checkpoints, read_progress, step_of
from tinystories_slm.training.loop import train_step
from tinystories_slm.training.run import start_run
from tinystories_slm.training.watching.estimate import Peak
from tinystories_slm.training.watching.tracking import read_metrics


def series(run_dir: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run_dir / "metrics.jsonl") if name in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_folder_explains_itself(tiny_run):
    config = tiny_run()
    run_dir = train(config)

    assert load_config(run_dir / "config.yaml") == config
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "best", "checkpoints", "config.yaml", "environment.json", "last", "loss.png", "manifest.json",
        "metrics.jsonl", "report.html", "run.lock", "samples.md",
    ]  # fmt: skip
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [
        "step_000008",
        "step_000012",
    ]
    lines = read_metrics(run_dir / "metrics.jsonl")
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 13))
    assert all(line["tokens"] == line["step"] * 8 * 32 for line in lines)
    assert set(logged[0]) == {
        "step", "tokens", "seconds", "train/loss", "train/lr", "train/grad_norm",
        "train/tokens_per_second", "train/mfu", "train/skipped_steps",
    }  # fmt: skip
    assert logged[0]["train/lr"] == pytest.approx(5e-3) and logged[1]["train/lr"] == pytest.approx(1e-2)
    assert list(series(run_dir, "val/loss")) == [4, 8, 12]
    assert series(run_dir, "train/loss")[12] < series(run_dir, "train/loss")[1] - 0.5
    samples = (run_dir / "samples.md").read_text()
    assert samples.count("## step") == 3 and samples.count("> Once upon a time") == 3
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert finished(config)


def test_best_is_the_model_of_the_lowest_validation_loss(tiny_run, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("tinystories_slm.training.loop.validation_loss", lambda *_: next(losses))
    run_dir = train(tiny_run("--train.keep_checkpoints", "3"))
    progress = read_progress(run_dir / "checkpoints" / "step_000012")

    assert (progress.best_step, progress.best_loss) == (8, 1.0)
    assert_equal(weights(run_dir / "best"), weights(run_dir / "checkpoints" / "step_000008"))
    assert_equal(weights(run_dir / "last"), weights(run_dir / "checkpoints" / "step_000012"))


def test_accumulation_changes_nothing_but_memory(tiny_run):
    whole = train(tiny_run(name="whole"))
    pieces = train(tiny_run("--train.per_device_batch_size", "1", name="pieces"))

    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert list(series(pieces, name).values()) == pytest.approx(
            list(series(whole, name).values()), rel=2e-4
        )


def test_a_run_that_stopped_half_way_ends_like_one_that_did_not(tiny_run):
    dropout = ("--model.dropout", "0.2", "--train.per_device_batch_size", "4")
    whole = train(tiny_run(*dropout, name="whole"))
    halves = train(tiny_run(*dropout, name="halves"))
    for folder in ("best", "last"):
        shutil.rmtree(halves / folder)
    shutil.rmtree(halves / "checkpoints" / "step_000012")  # as if it had been killed after step 8
    assert not finished(tiny_run(*dropout, name="halves"))
    assert train(tiny_run(*dropout, name="halves")) == halves

    assert_equal(weights(halves / "last"), weights(whole / "last"))
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss"):
        assert series(halves, name) == series(whole, name)
    assert (halves / "samples.md").read_text() == (whole / "samples.md").read_text()


def test_a_run_may_go_on_in_other_micro_batches(tiny_run):
    # 12 windows in 2 forwards, then in 3: Accelerate's own count of micro-batches would not survive this.
    batch = ("--train.batch_size", "12")
    whole = train(tiny_run(*batch, "--train.per_device_batch_size", "6", name="whole"))
    mixed = train(tiny_run(*batch, "--train.per_device_batch_size", "6", name="mixed"))
    for step in (8, 12):
        shutil.rmtree(mixed / "checkpoints" / f"step_{step:06d}")
    shutil.copytree(whole / "checkpoints" / "step_000008", mixed / "checkpoints" / "step_000008")
    train(tiny_run(*batch, "--train.per_device_batch_size", "4", name="mixed"))

    for name in ("train/loss", "train/grad_norm"):
        assert list(series(mixed, name).values()) == pytest.approx(
            list(series(whole, name).values()), rel=2e-4
        )


def test_a_run_does_not_go_on_with_other_data(tiny_run):
    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"run on other data: tokenizer_sha256 was '0+' and is"):
        train(tiny_run())


def test_a_folder_that_is_no_runs_is_left_alone(tiny_run, tmp_path):
    precious = tmp_path / "run" / "checkpoints" / "precious"
    precious.mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds checkpoints that no run of this program made"):
        train(tiny_run())
    assert precious.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir \(.*file\) cannot be written to"):
        train(tiny_run(name="file"))


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (999_000, 1_000_000, 200):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_2000000.partial").mkdir()

    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [200, 999_000, 1_000_000]


def test_muon_does_not_run_in_fp16(tiny_run, monkeypatch):
    monkeypatch.setattr("tinystories_slm.training.settings.resolve_precision", lambda *_: "fp16")
    with pytest.raises(InputError, match=r"fp16.*muon.*bf16"):
        start_run(tiny_run("--train.optimizer", "muon"))


def test_a_finished_run_is_not_trained_again(tiny_run):
    run_dir = train(tiny_run())
    before = (run_dir / "metrics.jsonl").read_text(), weights(run_dir / "last")
    train(tiny_run())

    assert (run_dir / "metrics.jsonl").read_text() == before[0]
    assert_equal(weights(run_dir / "last"), before[1])


def test_a_checkpoint_of_another_configuration_is_refused_with_every_difference(tiny_run):
    run_dir = train(tiny_run())
    before = (run_dir / "metrics.jsonl").read_text()
    with pytest.raises(InputError) as refusal:
        train(tiny_run("--model.hidden_size", "32", "--train.lr", "0.02", "--train.log_every", "5"))

    message = str(refusal.value)
    assert "model.hidden_size was 16 and is 32" in message and "train.lr was 0.01 and is 0.02" in message
    assert "log_every" not in message and "--train.resume never" in message and "\n" not in message
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_resume_never_starts_over(tiny_run):
    run_dir = train(tiny_run())
    (run_dir / "evaluation.json").write_text("{}")
    train(tiny_run("--train.resume", "never", "--model.hidden_size", "32", "--train.max_steps", "4"))

    assert list(series(run_dir, "train/loss")) == [1, 2, 3, 4]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000004"]
    assert not (run_dir / "evaluation.json").exists()  # it spoke of the old model
    model, _ = load_model_folder(str(run_dir / "last"))
    assert model.config.hidden_size == 32


def test_a_model_is_not_thrown_away_because_its_checkpoints_were(tiny_run):
    run_dir = train(tiny_run())
    before = weights(run_dir / "best")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(InputError, match=r"holds a trained model and no checkpoints .*--train.resume never"):
        train(tiny_run())
    (run_dir / "checkpoints").mkdir()  # as in a run that was killed before its first
    with pytest.raises(InputError, match=r"another configuration: train.lr was 0.01 and is 0.5"):
        train(tiny_run("--train.lr", "0.5"))

    assert_equal(weights(run_dir / "best"), before)
    train(tiny_run())


def test_an_older_checkpoint_of_the_folder_itself_is_not_passed_over_in_silence(tiny_run):
    run_dir = train(tiny_run())
    step_8, step_12 = checkpoints(run_dir)
    with pytest.raises(InputError, match=r"train.resume \(.*step_000008\) is not the newest .*--output_dir"):
        train(tiny_run("--train.resume", str(step_8)))
    train(tiny_run("--train.resume", str(step_12)))
    with pytest.raises(InputError, match=r"train.resume \(atuo\) must be auto, never, or a checkpoint"):
        tiny_run("--train.resume", "atuo")


def test_a_run_folder_without_its_manifest_is_not_to_be_emptied(tiny_run):
    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    manifest = (run_dir / "manifest.json").read_text()
    (run_dir / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"what data .* is gone or damaged; .*copy manifest.json from there"):
        train(tiny_run())
    (run_dir / "manifest.json").write_text(manifest)
    train(tiny_run())


def test_a_batch_that_the_processes_cannot_share_is_refused(tiny_run, monkeypatch):
    config = tiny_run("--train.per_device_batch_size", "8")
    state = SimpleNamespace(num_processes=3, device=torch.device("cpu"))
    monkeypatch.setattr("tinystories_slm.training.processes._processes", lambda: state)
    with pytest.raises(InputError, match=r"train.batch_size \(8\).*\(8 x 3\)"):
        start_run(config)
    assert not config.output_dir.exists()


def test_compiled_blocks_train_like_plain_ones(tiny_run):
    flags = ("--train.max_steps", "4", "--train.eval_every", "4")
    plain = train(tiny_run(*flags, name="plain"))
    compiled = train(tiny_run(*flags, "--train.compile", "true", name="compiled"))

    assert weights(compiled / "last").keys() == weights(plain / "last").keys()
    for name in ("train/loss", "val/loss"):
        expected = list(series(plain, name).values())
        assert list(series(compiled, name).values()) == pytest.approx(expected, rel=1e-4)


def test_a_peak_that_was_measured_too_low_is_measured_again(tiny_run, monkeypatch):
    peaks = iter([Peak(1.0, "measured: on a busy machine")])
    monkeypatch.setattr(
        run_module, "peak_flops", lambda *_: next(peaks, Peak(1e15, "measured: on a quiet one"))
    )
    run_dir = train(tiny_run())

    assert all(0 < share <= 1 for share in series(run_dir, "train/mfu").values())
    assert json.loads((run_dir / "environment.json").read_text())["peak_flops_per_second"] == 1e15


def test_the_end_is_reckoned_with_before_the_first_evaluation(tiny_run):
    run = start_run(tiny_run())
    run.seconds_per_token = 3.0
    assert run.closing_seconds == sum(map(len, run.validation)) > 0  # forward alone, a third of training
    run.progress.evaluation_seconds, run.progress.saving_seconds = 2.0, 0.5
    assert run.closing_seconds == 2.5
    run.close()


def test_a_scaled_learning_rate_is_trained_at_and_told(tiny_run, caplog):
    run_dir = train(tiny_run("--train.lr_scaling", "true"))

    # 16 wide and 8 x 32 tokens a step: (16 / 256)^-1 times (256 / 4096)^0.5, or 4.
    assert max(series(run_dir, "train/lr").values()) == pytest.approx(4 * 1e-2)
    told = "learning rate: 0.04 at its peak, 0.01 scaled from 256 wide, 4,096 tokens a step; adamw, cosine"
    assert told in caplog.text


def test_each_group_of_weights_is_trained_at_its_own_rate(tiny_run):
    run = start_run(tiny_run("--train.embedding_lr_rate", "3", "--train.warmup_steps", "0"))
    with closing(run):
        lr = train_step(run)["train/lr"]
        [optimizer] = run.optimizers
        assert [group["lr"] / lr for group in optimizer.param_groups] == pytest.approx([1.0, 1.0, 3.0])
