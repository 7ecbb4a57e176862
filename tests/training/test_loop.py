"""Training loop: metrics, evaluation, skipped steps, time limit."""

import json
import os
import shutil
import signal
from contextlib import closing
from itertools import islice

import pytest
import torch
from training.helpers import assert_equal_tensors, load_weights, read_series

from tinystories_slm.config import load_config
from tinystories_slm.data.packing import iter_documents
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.token_files import Manifest, open_prompt_lengths, open_tokens
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.evaluation.tasks import EVAL_TASKS, EvalResult
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.training import is_finished, loop, train
from tinystories_slm.training import run as run_module
from tinystories_slm.training.checkpoints import checkpoints, read_progress
from tinystories_slm.training.loop import train_step
from tinystories_slm.training.run import TrainingRun, start_run


def test_run_directory_contains_models_metrics_and_samples(tiny_run):
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
    assert list(read_series(run_dir, "val/loss")) == [4, 8, 12]
    assert read_series(run_dir, "train/loss")[12] < read_series(run_dir, "train/loss")[1] - 0.5
    samples = (run_dir / "samples.md").read_text()
    assert samples.count("## step") == 3 and samples.count("> Once upon a time") == 3
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert is_finished(config)


def test_evaluation_tasks_read_the_validation_stories(tiny_run, monkeypatch):
    def count(context):
        seen.append(context.held_out)
        return [EvalResult("held_out", len(context.held_out), "stories", 1)]

    seen = []
    monkeypatch.setitem(EVAL_TASKS, "held_out", count)
    config = tiny_run("--train.eval_tasks", "held_out", "--train.max_steps", "4")
    assert read_series(train(config), "val/held_out") == {4: 6}
    assert seen == [list(islice(iter_raw_stories(config.data.data_dir, "validation"), 6))]


def test_best_is_the_model_of_the_lowest_validation_loss(tiny_run, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("tinystories_slm.training.loop.validation_loss", lambda *_: next(losses))
    run_dir = train(tiny_run("--train.keep", "newest:3"))
    progress = read_progress(run_dir / "checkpoints" / "step_000012")

    assert (progress.best_step, progress.best_loss) == (8, 1.0)
    assert_equal_tensors(
        load_weights(run_dir / "best"), load_weights(run_dir / "checkpoints" / "step_000008")
    )
    assert_equal_tensors(
        load_weights(run_dir / "last"), load_weights(run_dir / "checkpoints" / "step_000012")
    )


def test_best_is_chosen_by_losses_of_the_same_stories(tiny_run, monkeypatch):
    def fake_loss(
        run, model
    ):  # of 6 stories lower than of 3; the last model is better than the one of step 8
        return {6: 1.0, 3: 3.0}[len(run.validation)] - 0.01 * model.config.training_step

    monkeypatch.setattr(loop, "validation_loss", fake_loss)
    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    shutil.rmtree(run_dir / "best")
    shutil.copytree(run_dir / "last", run_dir / "best")
    config = run_dir / "best" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"training_step": 8}))
    train(tiny_run("--train.eval_stories", "3"))
    progress = read_progress(run_dir / "checkpoints" / "step_000012")

    assert (progress.best_step, progress.best_num_stories) == (12, 3)
    assert progress.best_loss == pytest.approx(2.88)  # 0.92 of step 8 was of other stories
    assert read_series(run_dir, "val/num_stories") == {4: 6, 8: 6, 12: 3}


def test_best_of_an_earlier_version_is_scored_again_with_the_same_loss(tiny_run):
    run_dir = train(tiny_run())
    with closing(start_run(tiny_run())) as run:
        best_loss, run.progress.best_num_stories = run.progress.best_loss, 0  # as in checkpoints of 461afef
        run.progress.best_loss = 0.0
        loop.evaluate(run)
    assert run.progress.best_loss == pytest.approx(best_loss, rel=1e-6)
    assert best_loss == read_series(run_dir, "val/loss")[run.progress.best_step]


def test_checkpoint_of_another_window_order_is_resumed_with_a_warning(tiny_run, monkeypatch, caplog):
    flags = ("--train.max_steps", "8")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "ORDER_VERSION", 1)
        run_dir = train(tiny_run(*flags))
    assert read_progress(run_dir / "checkpoints" / "step_000008").window_order == 1
    with closing(start_run(tiny_run(*flags))) as run:
        assert run.progress.window_order == 2
    assert caplog.text.count("another order of the training windows") == 1
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "ORDER_VERSION", 1)
        with closing(start_run(tiny_run(*flags))):
            pass
    assert caplog.text.count("another order of the training windows") == 1


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_masked_stories_train_with_any_micro_batch(tiny_run, packing):
    flags = ("--data.packing", packing, "--data.mask_across_stories", "true", "--train.batch_size", "8")
    losses = [
        read_series(train(tiny_run(*flags, "--train.per_device_batch_size", rows, name=rows)), "train/loss")
        for rows in ("8", "1")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain = read_series(train(tiny_run(*flags[:2], "--train.batch_size", "8", name="plain")), "train/loss")
    if packing == "contiguous":  # stories are longer than half a window: in best_fit each has its own
        assert abs(losses[0][12] - plain[12]) > 1e-4


def test_loss_on_stories_of_blocks(tiny_run, tmp_path):
    folder = tmp_path / "blocks"
    flags = ("--data.source", "builtin-instruct", "--data.data_dir", str(folder), "--data.max_stories", "60")
    flags += ("--data.seq_len", "768", "--train.max_steps", "4", "--train.lr", "0.05")
    for loss_on in ("all", "story"):
        config = tiny_run(*flags, "--data.loss_on", loss_on, "--train.eval_stories", "3", name=loss_on)
        run_dir = train(config)
        manifest = Manifest.load(folder / "manifest.json")
        stories = iter_documents(open_tokens(folder, "validation", manifest), manifest.eos_token_id, limit=3)
        prompts = open_prompt_lengths(folder, "validation", manifest)
        model, tokenizer = load_model_folder(str(run_dir / "last"))
        whole, counted = [], []
        for ids, length in zip(stories, prompts, strict=False):
            ids = torch.tensor([[tokenizer.eos_token_id, *ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            whole.append(nats)
            counted.append(nats[length if loss_on == "story" else 0 :])
        expected = torch.cat(counted).mean().item()
        assert read_series(run_dir, "val/loss")[4] == pytest.approx(expected, rel=1e-5)
        assert (abs(torch.cat(whole).mean().item() - expected) > 1e-2) == (loss_on == "story")


def test_gradient_accumulation_keeps_the_losses(tiny_run):
    whole = train(tiny_run(name="whole"))
    accumulated = train(tiny_run("--train.per_device_batch_size", "1", name="accumulated"))

    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert list(read_series(accumulated, name).values()) == pytest.approx(
            list(read_series(whole, name).values()), rel=2e-4
        )


def test_a_finished_run_is_not_trained_again(tiny_run):
    run_dir = train(tiny_run())
    before = (run_dir / "metrics.jsonl").read_text(), load_weights(run_dir / "last")
    train(tiny_run())

    assert (run_dir / "metrics.jsonl").read_text() == before[0]
    assert_equal_tensors(load_weights(run_dir / "last"), before[1])


def test_compiled_blocks_train_like_eager_ones(tiny_run):
    flags = ("--train.max_steps", "4", "--train.eval_every", "4")
    eager = train(tiny_run(*flags, name="eager"))
    compiled = train(tiny_run(*flags, "--train.compile", "true", name="compiled"))

    assert load_weights(compiled / "last").keys() == load_weights(eager / "last").keys()
    for name in ("train/loss", "val/loss"):
        expected = list(read_series(eager, name).values())
        assert list(read_series(compiled, name).values()) == pytest.approx(expected, rel=1e-4)


def test_scaled_learning_rate_is_used_and_logged(tiny_run, caplog):
    run_dir = train(tiny_run("--train.lr_scaling", "true"))

    # Width 16 and 8 x 32 tokens per step: (16 / 256)^-1 times (256 / 4096)^0.5, or 4.
    assert max(read_series(run_dir, "train/lr").values()) == pytest.approx(4 * 1e-2)
    line = "learning rate: peak 0.04, scaled from 0.01 at width 256 and 4,096 tokens per step; adamw, cosine"
    assert line in caplog.text


def test_embedding_group_trains_at_its_own_rate(tiny_run):
    run = start_run(tiny_run("--train.embedding_lr_multiplier", "3", "--train.warmup_steps", "0"))
    with closing(run):
        lr = train_step(run)["train/lr"]
        [optimizer] = run.optimizers
        assert [group["lr"] / lr for group in optimizer.param_groups] == pytest.approx([1.0, 1.0, 3.0])


@pytest.mark.parametrize("check", ["each step", "when logging"])
def test_step_with_non_finite_gradient_is_skipped_and_counted(tiny_run, monkeypatch, caplog, fault, check):
    # A GPU skips the step by itself, and the loop reads the result when it logs, to avoid a sync per step.
    monkeypatch.setattr(TrainingRun, "checks_grad_on_host", check == "each step")
    train_step, seen = loop.train_step, []

    def step_with_nan(run):
        bad = run.progress.step + 1 in (5, 6)
        hook = (
            run.model.model.norm.register_forward_hook(lambda *call: call[2] * float("nan")) if bad else None
        )
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        update = train_step(run)
        if hook:
            hook.remove()
            loop._flush_device_metrics(run)
            seen.append(run.progress.consecutive_skipped_steps)
            assert_equal_tensors(run.model.state_dict(), before)
            [optimizer] = run.optimizers
            assert {int(state["step"]) for state in optimizer.state.values()} == {4}
        return update

    monkeypatch.setattr(loop, "train_step", step_with_nan)
    run_dir = train(tiny_run(name="nan"))

    assert seen == [1, 2]
    assert read_progress(checkpoints(run_dir)[-1]).skipped_steps == 2
    assert "step 5: loss or gradient is not finite, step skipped" in caplog.text
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line]
    assert {line["step"]: line["train/skipped_steps"] for line in lines}[12] == 2
    assert [line["step"] for line in lines] == [1, 2, 3, 4, *range(7, 13)]
    assert all(line["train/loss"] < 7 for line in lines)
    fault("the loss of single steps is NaN", "the steps have no effect and are counted; the run continues")


def test_repeated_nan_ends_the_run_with_a_remedy(tiny_run, fault):
    flags = (
        "--train.lr",
        "1e20",
        "--train.max_grad_norm",
        "1e30",
        "--train.max_consecutive_skipped_steps",
        "3",
    )
    with pytest.raises(UserError) as error:
        train(tiny_run(*flags, "--train.save_every", "1"))

    message = str(error.value)
    assert message.startswith("3 consecutive steps up to step ") and "lower train.lr (1e+20)" in message
    for folder in checkpoints(tiny_run().output_dir):
        assert read_progress(folder).consecutive_skipped_steps == 0  # no checkpoint after a skipped step
    fault(
        "the learning rate makes the weights diverge: NaN from some step on",
        "an error after train.max_consecutive_skipped_steps steps names the options to change; "
        "no checkpoint is saved meanwhile (exit code 2)",
    )


def test_time_limit_decays_the_learning_rate_and_ends_the_run(tiny_run, monkeypatch, fault):
    monkeypatch.setattr(
        TrainingRun, "seconds", property(lambda run: 1.0 * run.progress.step)
    )  # one second per step
    flags = ("--train.max_steps", "100000", "--train.max_minutes", "0.5", "--train.min_lr_rate", "0")
    whole = train(tiny_run(*flags, name="whole"))
    config = tiny_run(*flags, name="accumulated")
    train_step, stops = loop.train_step, {11, 18}

    def interrupted_step(run):
        if run.progress.step + 1 in stops:
            stops.remove(run.progress.step + 1)
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            train(config)
    accumulated = train(config)

    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "train/lr" in line]
    rates = {line["step"]: line["train/lr"] for line in lines}
    assert 26 <= max(rates) <= 30  # time for the final evaluation and save is reserved
    decay = [rates[step] for step in range(3, max(rates) + 1)]
    assert decay == sorted(decay, reverse=True) and decay[-1] < 0.02 * decay[0]
    assert is_finished(tiny_run(*flags, name="whole")) and is_finished(config)
    assert read_metrics(whole / "metrics.jsonl")[-1].get("val/loss")
    again = [line for line in read_metrics(accumulated / "metrics.jsonl") if "train/lr" in line]
    assert [line["step"] for line in again] == list(range(1, len(again) + 1))
    decay = [line["train/lr"] for line in again[2:]]
    assert decay == sorted(decay, reverse=True) and decay[-1] < 0.02 * decay[0]
    fault("train.max_minutes is over", "the schedule has decayed; final evaluation and save, exit code 0")
