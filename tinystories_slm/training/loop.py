"""Training loop; `train` shows the order of everything that happens in a run."""

import contextlib
import logging
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from tinystories_slm.config import RunConfig
from tinystories_slm.data.packing import IGNORED_LABEL
from tinystories_slm.data.streaming import StreamError
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.evaluation.tasks import EvalContext, parse_task_names, run_tasks
from tinystories_slm.generation import generate_texts
from tinystories_slm.generation.prompts import default_prompt
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, save_model_folder
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.checkpoints import save_checkpoint
from tinystories_slm.training.distributed import broadcast_from_main, process_group
from tinystories_slm.training.machine_errors import translate_machine_errors
from tinystories_slm.training.optimizers import set_learning_rate
from tinystories_slm.training.restore import restore_finished_run
from tinystories_slm.training.retention import KeptSteps
from tinystories_slm.training.run import TrainingRun, is_finished, start_run
from tinystories_slm.training.schedule import lr_factor, time_fraction

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> Path:
    """Train the model that `config` describes, or resume it from the newest checkpoint of its run directory.

    Returns:
        The run directory: `best/`, `last/` and those in `steps/` are model folders, `checkpoints/` holds
        what resumes the run, and metrics.jsonl, loss.png and samples.md record it.

    Raises:
        UserError: the configuration, data or checkpoint is invalid (nothing was changed), or the machine
            is out of memory or disk (saved files are intact).
        TrainingInterrupted: a stop signal arrived (see `signals`); the current step was finished and saved.
    """
    args = config.train
    if is_finished(config):
        logger.info("the run in %s is already finished", config.output_dir)
        restore_finished_run(config)
        return config.output_dir
    KeptSteps.parse(args.keep)  # both raise before anything is written
    parse_task_names(args.eval_tasks, "train.eval_tasks")
    run = start_run(config)
    with (
        process_group(run.accelerator),
        closing(run),
        run.stop,
        run.watchdog,
        translate_machine_errors(config, run.runtime),
        finished_write(run),
        saved_at_stream_error(run),
    ):
        if run.progress.step == 0:
            keep_step(run)
        while not run.is_ending:
            was_before_decay = run.is_before_decay
            update = train_step(run)
            sync_stop_condition(run)
            if was_before_decay and not run.is_before_decay:
                run.progress.decay_step = run.progress.step
            if run.is_due(args.log_every):
                log(run, update)
            if run.is_due(args.eval_every):
                evaluate(run)
            keep_step(run)
            if run.should_save:
                save(run)
    progress = run.progress
    if not progress.finished:
        raise TrainingInterrupted(
            f"stopped after step {progress.step} of {args.max_steps}, checkpoint saved; run the same command "
            "to resume"
        )
    logger.info(
        "run complete: all %d steps saved in %s, best validation loss %.4f at step %d",
        progress.step, config.output_dir, progress.best_loss, progress.best_step,
    )  # fmt: skip
    return config.output_dir


def train_step(run: TrainingRun) -> dict[str, float | torch.Tensor]:
    """Run one optimizer step: forward and backward over the batch, clip, update.

    A step with a non-finite gradient changes neither weights nor optimizer state, and is counted.

    Returns:
        Learning rate of the step, and gradient norm before clipping, still on the device.
    """
    accelerator, args, model = run.accelerator, run.config.train, run.prepared_model
    progress = run.progress
    factor = lr_factor(args, progress.step, progress.time_fraction, rewarm_step=progress.rewarm_step)
    lr = run.peak_lr * factor
    set_learning_rate(run.optimizers, lr)
    model.train()
    _seed_dropout(run)
    step_loss = torch.zeros((), device=accelerator.device)
    for inputs in micro_batches(run):
        run.watchdog.advance(run.progress.step)
        with accelerator.accumulate(model):
            loss = model(**inputs, use_cache=False, loss_only=True).loss
            accelerator.backward(loss)
            step_loss += loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                # Norm of the gradient over all processes: all skip or step together.
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                skipped = _should_skip_step(run, grad_norm)
            for optimizer in run.optimizers:  # no-ops until the last micro-batch
                # The fp16 scaler skips by itself, and must see the step to lower its scale.
                if not (accelerator.sync_gradients and skipped) or accelerator.scaler is not None:
                    optimizer.step()
                optimizer.zero_grad()
    run.local_losses.append(step_loss)
    progress.step += 1
    if run.ema:
        run.ema.update(run.model, progress.step)
    run.display.advance()
    return {"train/lr": lr, "train/grad_norm": grad_norm}


def sync_stop_condition(run: TrainingRun) -> None:
    """Synchronize elapsed time, requests to stop or save, failed writes and end of run over all processes.

    On several accelerators the all-reduce forces a device sync, so it runs only on logging steps and at
    the last step.

    Raises:
        UserError: a sharded checkpoint could not be written; raised on every process.
    """
    accelerator, args, progress = run.accelerator, run.config.train, run.progress
    is_last_step = progress.step >= args.max_steps
    reduce_forces_sync = accelerator.num_processes > 1 and accelerator.device.type != "cpu"
    if reduce_forces_sync and not is_last_step and progress.step % args.log_every:
        return
    seconds, estimated_final_seconds, stop_requests, save_requests, failed_writes = (
        run.seconds,
        run.estimated_final_seconds,
        float(run.stop.received is not None),
        float(run.stop.hung_up),
        float(run.writer is not None and run.writer.has_failed),
    )
    if save_requests:
        run.stop.hung_up = False
    if accelerator.num_processes > 1:
        is_main = accelerator.is_main_process  # the times are those of the main process alone
        local = torch.tensor(
            [
                seconds if is_main else 0.0,
                estimated_final_seconds if is_main else 0.0,
                stop_requests,
                save_requests,
                failed_writes,
            ],
            # Other devices, such as MPS, have no float64.
            dtype=torch.float64 if accelerator.device.type in ("cpu", "cuda") else torch.float32,
            device=accelerator.device,
        )
        sums = accelerator.reduce(local, reduction="sum").tolist()
        seconds, estimated_final_seconds, stop_requests, save_requests, failed_writes = sums
    if failed_writes:
        run.writer.wait()
    progress.seconds, run.stop_agreed, run.save_agreed = seconds, stop_requests > 0, save_requests > 0
    if progress.step <= progress.rewarm_step + args.warmup_steps:
        progress.warmup_seconds = seconds
    used = time_fraction(
        args,
        seconds=seconds,
        warmup_seconds=progress.warmup_seconds,
        estimated_final_seconds=estimated_final_seconds,
    )
    progress.time_fraction = max(progress.time_fraction, used)  # the estimate of the end may change
    progress.finished = is_last_step or progress.time_fraction >= 1.0


def micro_batches(run: TrainingRun) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model inputs of this process's share of the step's batch, one micro-batch at a time.

    `input_ids`, `labels` and, with `data.mask_across_stories`, `position_ids` are int64
    (per_device_batch_size, seq_len). The mean of the losses over micro-batches and processes is the mean over
    all predicted tokens of the batch. If every token is predicted, micro-batches have equally many. If not,
    `num_items_in_batch` is their mean number, by which the model divides the sum.
    """
    accelerator, args = run.accelerator, run.config.train
    share = args.batch_size // accelerator.num_processes
    first = accelerator.process_index * share
    # A stream waits for its source, with retries of its own.
    with run.watchdog.paused() if run.config.data.streaming else contextlib.nullcontext():
        batch = run.dataset.batch(run.progress.step, args.batch_size, rows=slice(first, first + share))
    rows = run.runtime.per_device_batch_size
    inputs = {"input_ids": _copy_to(accelerator.device, batch.input_ids)}
    inputs["labels"] = inputs["input_ids"]
    if batch.position_ids is not None:
        inputs["position_ids"] = _copy_to(accelerator.device, batch.position_ids)
    num_items = {}
    if batch.labels is not batch.input_ids:
        inputs["labels"] = _copy_to(accelerator.device, batch.labels)
        num_predicted = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum().float()
        mean_predicted = accelerator.reduce(num_predicted, reduction="mean") * (rows / share)
        num_items["num_items_in_batch"] = mean_predicted.clamp(min=1)  # a batch may predict nothing
    for start in range(0, share, rows):
        yield {name: values[start : start + rows] for name, values in inputs.items()} | num_items


def _copy_to(device: torch.device, ids: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(ids)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # the copy overlaps with computation
    return tensor.to(device, non_blocking=True)


def log(run: TrainingRun, update: dict[str, float | torch.Tensor]) -> None:
    """Log the mean loss since the last log line, with speed, MFU and `update`, the result of the step."""
    _flush_device_metrics(run)
    losses, progress = run.progress.unlogged_losses, run.progress
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return  # every step was skipped; `_count_step` has logged a warning
    speed = (progress.step - run.timer_start_step) * run.tokens_per_step / run.stopwatch.elapsed_s()
    if run.peak_flops.is_measured and run.mfu(speed) > 1.0:
        run.remeasure_peak()
    metrics = {
        "train/loss": math.fsum(finite) / len(finite),
        **{name: float(value) for name, value in update.items() if math.isfinite(value)},
        "train/tokens_per_second": speed,
        "train/mfu": run.mfu(speed),
        "train/skipped_steps": progress.skipped_steps,
        "seconds": round(progress.seconds, 3),
    }
    if run.dataset.num_stories_read is not None:
        metrics["train/num_stories_read"] = run.dataset.num_stories_read
    run.recorder.log(metrics, step=progress.step, tokens=run.tokens)
    run.display.show(progress.step, metrics)
    losses.clear()
    run.stopwatch.restart()
    run.timer_start_step, run.seconds_per_token = progress.step, 1.0 / speed


def evaluate(run: TrainingRun) -> None:
    """Log the validation loss, a generated story and the loss plot; save best/ if the loss improved."""
    args, progress = run.config.train, run.progress
    _rescore_best(run)
    with run.stopwatch.paused():
        model = run.eval_model()
        loss = validation_loss(run, model)
        metrics = {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/num_stories": len(run.validation),
        }
        metrics |= measure_tasks(run, model)
        if math.isfinite(loss):
            run.recorder.log(metrics, step=progress.step, tokens=run.tokens)
        run.display.show(progress.step, metrics)
        improved = loss < progress.best_loss
        if improved:
            progress.best_loss, progress.best_step = loss, progress.step
            progress.best_num_stories = len(run.validation)
        if run.accelerator.is_main_process:
            with _force_eager(run.runtime.compiled):
                [story] = generate_texts(
                    model,
                    run.tokenizer,
                    [default_prompt(run.tokenizer)],
                    max_new_tokens=run.config.data.seq_len,
                    seed=args.seed,
                )
            run.recorder.log_sample(story, step=progress.step)
            if improved:
                save_model_folder(model, run.tokenizer, run.config.output_dir / "best")
            run.recorder.plot()  # the report reads the step of best/
    progress.evaluation_seconds = run.stopwatch.paused_s


def measure_tasks(run: TrainingRun, model: TinyStoriesForCausalLM) -> dict[str, float]:
    """Return the results of `train.eval_tasks` by `val/NAME`, on the main process; others get nothing."""
    names = parse_task_names(run.config.train.eval_tasks, "train.eval_tasks")
    if not names or not run.accelerator.is_main_process:
        return {}
    context = EvalContext(
        model=model,
        tokenizer=run.tokenizer,
        max_new_tokens=run.config.data.seq_len,
        seed=run.config.train.seed,
        held_out=run.tokenizer.batch_decode(run.validation, skip_special_tokens=True),
    )
    with _force_eager(run.runtime.compiled):
        results = run_tasks(names, context)
    for result in results:
        logger.info("step %d/%d: %s", run.progress.step, run.config.train.max_steps, result)
    return {f"val/{result.name}": result.value for result in results}


def _rescore_best(run: TrainingRun) -> None:
    """Score best/ again if its loss is of other stories than this session's (`train.eval_stories`)."""
    progress, best = run.progress, run.config.output_dir / "best"
    if not progress.best_step or progress.best_num_stories == len(run.validation):
        return
    progress.best_loss, progress.best_num_stories = math.inf, len(run.validation)
    if broadcast_from_main(run.accelerator, best.is_dir):  # otherwise this evaluation writes it
        with run.stopwatch.paused():
            model, _ = load_model_folder(str(best), device=run.accelerator.device)
            model.set_attn_implementation(run.runtime.attention)
            progress.best_loss = validation_loss(run, model)
        logger.info(
            "best/ has a validation loss of %.4f on %d stories", progress.best_loss, len(run.validation)
        )


def validation_loss(run: TrainingRun, model: TinyStoriesForCausalLM) -> float:
    """Return the validation loss in nats per token; each process scores a share of the stories.

    With `data.loss_on` story, the prompts of blocks are context.
    """
    accelerator = run.accelerator
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    with _force_eager(run.runtime.compiled):
        scores = score_stories(
            model,
            run.validation[share],
            eos_token_id=run.tokenizer.eos_token_id,
            batch_size=2 * run.runtime.per_device_batch_size,
            autocast=accelerator.autocast(),
        )
    prompts = run.validation_prompts
    shares = gather_object([scores.totals(None if prompts is None else prompts[share])])
    nats, num_tokens = np.sum(shares, axis=0)
    return float(nats / num_tokens)


def keep_step(run: TrainingRun) -> None:
    """Save the model of this step to steps/, if `train.keep` keeps it.

    Before the checkpoint: a run that is killed in between resumes before this step and saves it again.
    """
    progress = run.progress
    if run.keeps_step:
        with run.stopwatch.paused():
            model = run.eval_model()
            if run.accelerator.is_main_process:
                folder = RunDir(run.config.output_dir).step(progress.step)
                folder.parent.mkdir(exist_ok=True)
                save_model_folder(model, run.tokenizer, folder)
    if progress.step == 0 and run.kept_steps.saves_checkpoint(0):
        save(run)


def save(run: TrainingRun) -> None:
    """Save the model to last/, and a checkpoint.

    With `train.sharded_checkpoints` the processes write the checkpoint while the run goes on, and last/ is
    saved first and at the end. After skipped steps nothing is saved, unless the run ends here: the
    checkpoints from before them stay.
    """
    progress = run.progress
    progress.stream = run.dataset.stream_position(progress.step, run.config.train.batch_size)
    _flush_device_metrics(run)
    if progress.consecutive_skipped_steps and not run.is_ending:
        return
    last, args = run.config.output_dir / "last", run.config.train
    # Without a step the optimizers have no state, and its shards would hold one of a step.
    writer = run.writer if progress.step else None
    with run.stopwatch.paused():
        # A resumed run finds the record of the training data in last/.
        if writer is None or run.is_ending or not broadcast_from_main(run.accelerator, last.is_dir):
            model = run.eval_model()
            if run.accelerator.is_main_process:
                save_model_folder(model, run.tokenizer, last)
        save_checkpoint(run.state, run.config.output_dir, progress, args=args, writer=writer)
        if writer and run.is_ending:
            writer.wait()
    progress.saving_seconds = run.stopwatch.paused_s


@contextlib.contextmanager
def finished_write(run: TrainingRun) -> Iterator[None]:
    """Let a checkpoint that is being written become complete, also if an error ends the run."""
    try:
        yield
    finally:
        if run.writer:
            with run.stopwatch.paused():  # for the watchdog: no process advances
                run.writer.close()


@contextlib.contextmanager
def saved_at_stream_error(run: TrainingRun) -> Iterator[None]:
    """Save the steps before a `StreamError`, which every process raises between two steps."""
    try:
        yield
    except StreamError:
        if run.progress.step:
            save(run)
        raise


def _should_skip_step(run: TrainingRun, grad_norm: torch.Tensor) -> bool:
    """Whether to skip the optimizer step because the gradient is not finite.

    Where reading `grad_norm` would force a device sync, the result is False. The fused AdamW kernel then
    reads `found_inf` on the device and skips by itself, and the next log or save counts the step.
    """
    if run.checks_grad_on_host:
        finite = math.isfinite(grad_norm)
        _count_step(run, finite=finite, step=run.progress.step + 1)
        return not finite
    finite = torch.isfinite(grad_norm)
    for optimizer in run.optimizers:
        optimizer.optimizer.found_inf = 1.0 - finite.float()  # torch's fused AdamW reads this attribute
    run.pending_finite_flags.append(finite)
    return False


def _count_step(run: TrainingRun, *, finite: bool, step: int) -> None:
    """Update the counters of skipped steps.

    Raises:
        UserError: `train.max_consecutive_skipped_steps` is reached.
    """
    args, progress = run.config.train, run.progress
    progress.consecutive_skipped_steps = 0 if finite else progress.consecutive_skipped_steps + 1
    progress.skipped_steps += not finite
    if progress.consecutive_skipped_steps == 1:
        logger.warning("step %d: loss or gradient is not finite, step skipped", step)
    if progress.consecutive_skipped_steps >= args.max_consecutive_skipped_steps:
        raise UserError(
            f"{progress.consecutive_skipped_steps} consecutive steps up to step {step} had a non-finite loss "
            f"or gradient; earlier checkpoints are intact; lower train.lr ({args.lr}), increase "
            f"train.warmup_steps ({args.warmup_steps}) or set train.mixed_precision to no, and start over "
            "with --train.resume never"
        )


def _flush_device_metrics(run: TrainingRun) -> None:
    """Read the results of the last steps from the device: skipped steps, and losses.

    The losses are averaged over all processes.
    """
    flags, last = run.pending_finite_flags, run.progress.step
    for i, finite in enumerate(torch.stack(flags).tolist() if flags else []):
        _count_step(run, finite=finite, step=last - len(flags) + i + 1)
    flags.clear()
    if run.local_losses:
        losses = run.accelerator.reduce(torch.stack(run.local_losses), reduction="mean")
        run.progress.unlogged_losses += losses.tolist()
        run.local_losses.clear()


def _seed_dropout(run: TrainingRun) -> None:
    """Make dropout a function of (seed, step, process), so that no random state has to be saved."""
    key = (run.config.train.seed, run.progress.step, run.accelerator.process_index)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _force_eager(compiled: bool) -> contextlib.AbstractContextManager:
    """Run compiled blocks eagerly: they would be recompiled for every story length."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
