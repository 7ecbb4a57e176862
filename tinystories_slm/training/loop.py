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
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.generation import generate_texts
from tinystories_slm.generation.prompts import DEFAULT_PROMPT
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.training.checkpoints import save_checkpoint
from tinystories_slm.training.machine_errors import translate_machine_errors
from tinystories_slm.training.optimizers import set_learning_rate
from tinystories_slm.training.run import TrainingRun, is_finished, start_run
from tinystories_slm.training.schedule import lr_factor, time_fraction

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> Path:
    """Train the model that `config` describes, or resume it from the newest checkpoint of its run directory.

    Returns:
        The run directory: `best/` and `last/` are model folders, `checkpoints/` holds what resumes the
        run, and metrics.jsonl, loss.png and samples.md record it.

    Raises:
        UserError: the configuration, data or checkpoint is invalid (nothing was changed), or the machine
            is out of memory or disk (saved files are intact).
        TrainingInterrupted: SIGTERM, SIGINT or SIGUSR1 arrived; the current step was finished and saved.
    """
    args = config.train
    if is_finished(config):
        logger.info("the run in %s is already finished", config.output_dir)
        return config.output_dir
    run = start_run(config)
    with closing(run), run.stop, translate_machine_errors(config, run.runtime):
        while not (run.progress.finished or run.stop_agreed):
            update = train_step(run)
            sync_stop_condition(run)
            if run.is_due(args.log_every):
                log(run, update)
            if run.is_due(args.eval_every):
                evaluate(run)
            if run.is_due(args.save_every) or run.stop_agreed:
                save(run)
    run.accelerator.end_training()
    progress = run.progress
    if not progress.finished:
        raise TrainingInterrupted(
            f"stopped after step {progress.step} of {args.max_steps}, checkpoint saved; run the same command "
            "to resume"
        )
    logger.info("best validation loss %.4f at step %d", progress.best_loss, progress.best_step)
    return config.output_dir


def train_step(run: TrainingRun) -> dict[str, float | torch.Tensor]:
    """Run one optimizer step: forward and backward over the batch, clip, update.

    A step with a non-finite gradient changes neither weights nor optimizer state, and is counted.

    Returns:
        Learning rate of the step, and gradient norm before clipping, still on the device.
    """
    accelerator, args, model = run.accelerator, run.config.train, run.prepared_model
    lr = run.peak_lr * lr_factor(args, run.progress.step, run.progress.time_fraction)
    set_learning_rate(run.optimizers, lr)
    model.train()
    _seed_dropout(run)
    step_loss = torch.zeros((), device=accelerator.device)
    for input_ids in micro_batches(run):  # (per_device_batch_size, seq_len)
        with accelerator.accumulate(model):
            # Every sequence is full, so the mean over micro-batches is the mean over the batch's tokens.
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, loss_only=True).loss
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
    run.progress.step += 1
    if run.ema:
        run.ema.update(run.model, run.progress.step)
    run.display.advance()
    return {"train/lr": lr, "train/grad_norm": grad_norm}


def sync_stop_condition(run: TrainingRun) -> None:
    """Synchronize elapsed time, stop requests and end of run over all processes.

    On several accelerators the all-reduce forces a device sync, so it runs only on logging steps and at
    the last step.
    """
    accelerator, args, progress = run.accelerator, run.config.train, run.progress
    is_last_step = progress.step >= args.max_steps
    reduce_forces_sync = accelerator.num_processes > 1 and accelerator.device.type != "cpu"
    if reduce_forces_sync and not is_last_step and progress.step % args.log_every:
        return
    seconds, estimated_final_seconds, stop_requests = (
        run.seconds,
        run.estimated_final_seconds,
        float(run.stop.received is not None),
    )
    if accelerator.num_processes > 1:
        is_main = accelerator.is_main_process  # the times are those of the main process alone
        local = torch.tensor(
            [seconds if is_main else 0.0, estimated_final_seconds if is_main else 0.0, stop_requests],
            # Other devices, such as MPS, have no float64.
            dtype=torch.float64 if accelerator.device.type in ("cpu", "cuda") else torch.float32,
            device=accelerator.device,
        )
        seconds, estimated_final_seconds, stop_requests = accelerator.reduce(local, reduction="sum").tolist()
    progress.seconds, run.stop_agreed = seconds, stop_requests > 0
    if progress.step <= args.warmup_steps:
        progress.warmup_seconds = seconds
    used = time_fraction(
        args,
        seconds=seconds,
        warmup_seconds=progress.warmup_seconds,
        estimated_final_seconds=estimated_final_seconds,
    )
    progress.time_fraction = max(progress.time_fraction, used)  # the estimate of the end may change
    progress.finished = is_last_step or progress.time_fraction >= 1.0


def micro_batches(run: TrainingRun) -> Iterator[torch.Tensor]:
    """Yield this process's share of the step's batch as int64 (per_device_batch_size, seq_len)."""
    accelerator, args = run.accelerator, run.config.train
    share = args.batch_size // accelerator.num_processes
    first = accelerator.process_index * share
    rows = run.dataset.batch(run.progress.step, args.batch_size, rows=slice(first, first + share))
    input_ids = torch.from_numpy(rows)
    if accelerator.device.type == "cuda":
        input_ids = input_ids.pin_memory()  # the copy overlaps with computation
    input_ids = input_ids.to(accelerator.device, non_blocking=True)
    yield from input_ids.split(run.runtime.per_device_batch_size)


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
    run.recorder.log(metrics, step=progress.step, tokens=run.tokens)
    run.display.show(progress.step, metrics)
    losses.clear()
    run.stopwatch.restart()
    run.timer_start_step, run.seconds_per_token = progress.step, 1.0 / speed


def evaluate(run: TrainingRun) -> None:
    """Log the validation loss, a generated story and the loss plot; save best/ if the loss improved."""
    args, progress = run.config.train, run.progress
    with run.stopwatch.paused():
        model = run.eval_model()
        loss = validation_loss(run, model)
        metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
        if math.isfinite(loss):
            run.recorder.log(metrics, step=progress.step, tokens=run.tokens)
        run.display.show(progress.step, metrics)
        improved = loss < progress.best_loss
        if improved:
            progress.best_loss, progress.best_step = loss, progress.step
        if run.accelerator.is_main_process:
            with _force_eager(run.runtime.compiled):
                [story] = generate_texts(
                    model,
                    run.tokenizer,
                    [DEFAULT_PROMPT],
                    max_new_tokens=run.config.data.seq_len,
                    seed=args.seed,
                )
            run.recorder.log_sample(story, step=progress.step)
            run.recorder.plot()
            if improved:
                save_model_folder(model, run.tokenizer, run.config.output_dir / "best")
    progress.evaluation_seconds = run.stopwatch.paused_s


def validation_loss(run: TrainingRun, model: TinyStoriesForCausalLM) -> float:
    """Return the validation loss in nats per token; each process scores a share of the stories."""
    accelerator = run.accelerator
    with _force_eager(run.runtime.compiled):
        scores = score_stories(
            model,
            run.validation[accelerator.process_index :: accelerator.num_processes],
            eos_token_id=run.tokenizer.eos_token_id,
            batch_size=2 * run.runtime.per_device_batch_size,
            autocast=accelerator.autocast(),
        )
    shares = gather_object([(scores.nats.sum(), scores.num_tokens.sum())])
    nats, num_tokens = np.sum(shares, axis=0)
    return float(nats / num_tokens)


def save(run: TrainingRun) -> None:
    """Save the model to last/, and a checkpoint.

    After skipped steps nothing is saved, unless the run ends here: the checkpoints from before them stay.
    """
    progress = run.progress
    _flush_device_metrics(run)
    if progress.consecutive_skipped_steps and not (progress.finished or run.stop_agreed):
        return
    with run.stopwatch.paused():
        model = run.eval_model()
        if run.accelerator.is_main_process:
            save_model_folder(model, run.tokenizer, run.config.output_dir / "last")
        keep = run.config.train.keep_checkpoints
        save_checkpoint(run.accelerator, run.config.output_dir, progress, keep=keep, ema=run.ema)
    progress.saving_seconds = run.stopwatch.paused_s


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
