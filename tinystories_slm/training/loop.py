"""The training loop. Read `train` from top to bottom: it is the whole plot."""

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
from tinystories_slm.errors import InputError, Stopped
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.generation import generate_stories
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.training.checkpoints import save_checkpoint
from tinystories_slm.training.failures import plainly
from tinystories_slm.training.run import Run, finished, start_run
from tinystories_slm.training.schedule import lr_factor, time_fraction

logger = logging.getLogger(__name__)

SAMPLE_PROMPT = "Once upon a time"


def train(config: RunConfig) -> Path:
    """Train the model that `config` describes, or go on where its run folder stands.

    Returns:
        The run folder: `best/` and `last/` are model folders, `checkpoints/` resumes the run, and
        metrics.jsonl, loss.png and samples.md tell how it went.

    Raises:
        InputError: a configuration, data or checkpoint that cannot be right (nothing was changed), or a
            machine that gives no more (nothing that was saved is lost).
        Stopped: SIGTERM, SIGINT or SIGUSR1 came; the step was finished and saved.
    """
    args = config.train
    if finished(config):
        logger.info("%s is trained to its end already", config.output_dir)
        return config.output_dir
    run = start_run(config)
    with closing(run), run.stop, plainly(config, run.settings):
        while not (run.progress.finished or run.stop_agreed):
            update = train_step(run)
            agree(run)
            if run.due(args.log_every):
                log(run, update)
            if run.due(args.eval_every):
                evaluate(run)
            if run.due(args.save_every) or run.stop_agreed:
                save(run)
    run.accelerator.end_training()
    progress = run.progress
    if not progress.finished:
        raise Stopped(
            f"stopped after step {progress.step} of {args.max_steps}, saved; the same command goes on"
        )
    logger.info("best validation loss %.4f at step %d", progress.best_loss, progress.best_step)
    return config.output_dir


def train_step(run: Run) -> dict[str, float | torch.Tensor]:
    """One optimizer step: forward and backward over the batch, clip, update.

    A step without a finite gradient changes neither weights nor optimizer, and is counted.

    Returns:
        The learning rate it ran at and the gradient's norm before clipping, still on the device.
    """
    accelerator, args, model = run.accelerator, run.config.train, run.prepared_model
    lr = run.peak_lr * lr_factor(args, run.progress.step, run.progress.time_fraction)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_rate", 1.0)
    model.train()
    _seed_dropout(run)
    step_loss = torch.zeros((), device=accelerator.device)
    for input_ids in micro_batches(run):  # (per_device_batch_size, seq_len)
        with accelerator.accumulate(model):
            # Every window is full, so the mean over micro-batches is the mean over the batch's tokens.
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, loss_only=True).loss
            accelerator.backward(loss)
            step_loss += loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                # The norm of the gradient over all processes: all see the same, and skip or step together.
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                skipped = _skip_unless_finite(run, grad_norm)
            for optimizer in run.optimizers:  # which do nothing until the last micro-batch
                # In fp16 the scaler skips by itself, and has to see the step to lower its scale.
                if not (accelerator.sync_gradients and skipped) or accelerator.scaler is not None:
                    optimizer.step()
                optimizer.zero_grad()
    run.local_losses.append(step_loss)
    run.progress.step += 1
    if run.average:
        run.average.update(run.model, run.progress.step)
    run.display.advance()
    return {"train/lr": lr, "train/grad_norm": grad_norm}


def agree(run: Run) -> None:
    """What every process has to know alike: the time, whether to stop, and whether this was the last step.

    On several accelerators asking each other would wait for the step, so they ask when they log.
    """
    accelerator, args, progress = run.accelerator, run.config.train, run.progress
    last = progress.step >= args.max_steps
    asking_waits = accelerator.num_processes > 1 and accelerator.device.type != "cpu"
    if asking_waits and not last and progress.step % args.log_every:
        return
    seconds, closing_seconds, asked = run.seconds, run.closing_seconds, run.stop.received is not None
    if accelerator.num_processes > 1:
        first = accelerator.is_main_process
        told = torch.tensor(
            [seconds if first else 0.0, closing_seconds if first else 0.0, float(asked)],
            dtype=torch.float64,
            device=accelerator.device,
        )
        seconds, closing_seconds, asked = accelerator.reduce(told, reduction="sum").tolist()
    progress.seconds, run.stop_agreed = seconds, asked > 0
    if progress.step <= args.warmup_steps:
        progress.warmup_seconds = seconds
    used = time_fraction(
        args, seconds=seconds, warmup_seconds=progress.warmup_seconds, closing_seconds=closing_seconds
    )
    progress.time_fraction = max(progress.time_fraction, used)  # the estimate of the end may move
    progress.finished = last or progress.time_fraction >= 1.0


def micro_batches(run: Run) -> Iterator[torch.Tensor]:
    """This process's share of the step's batch, (per_device_batch_size, seq_len) int64 at a time."""
    accelerator, args = run.accelerator, run.config.train
    share = args.batch_size // accelerator.num_processes
    first = accelerator.process_index * share
    rows = run.windows.batch(run.progress.step, args.batch_size, rows=slice(first, first + share))
    input_ids = torch.from_numpy(rows)
    if accelerator.device.type == "cuda":
        input_ids = input_ids.pin_memory()  # copied while the device computes
    input_ids = input_ids.to(accelerator.device, non_blocking=True)
    yield from input_ids.split(run.settings.per_device_batch_size)


def log(run: Run, update: dict[str, float | torch.Tensor]) -> None:
    """A line of metrics.jsonl: the mean loss since the last one, and how it was come by."""
    _catch_up(run)
    losses, progress = run.progress.unlogged_losses, run.progress
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return  # every step was skipped; `_count_skipped` has told
    speed = (progress.step - run.timed_from) * run.tokens_per_step / run.stopwatch.elapsed_s()
    metrics = {
        "train/loss": math.fsum(finite) / len(finite),
        **{name: float(value) for name, value in update.items() if math.isfinite(value)},
        "train/tokens_per_second": speed,
        "train/mfu": run.utilisation(speed),
        "train/skipped_steps": progress.skipped_steps,
        "seconds": round(progress.seconds, 3),
    }
    run.record.log(metrics, step=progress.step, tokens=run.tokens)
    run.display.show(progress.step, metrics)
    losses.clear()
    run.stopwatch.restart()
    run.timed_from, run.seconds_per_token = progress.step, 1.0 / speed


def evaluate(run: Run) -> None:
    """Validation loss, a story, the curves; and best/, if there has been no better model."""
    args, progress = run.config.train, run.progress
    with run.stopwatch.paused():
        model = run.model_to_keep()
        loss = validation_loss(run, model)
        metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
        if math.isfinite(loss):
            run.record.log(metrics, step=progress.step, tokens=run.tokens)
        run.display.show(progress.step, metrics)
        better = loss < progress.best_loss
        if better:
            progress.best_loss, progress.best_step = loss, progress.step
        if run.accelerator.is_main_process:
            with _eager(run.settings.compiled):
                [story] = generate_stories(
                    model,
                    run.tokenizer,
                    [SAMPLE_PROMPT],
                    max_new_tokens=run.config.data.seq_len,
                    seed=args.seed,
                )
            run.record.sample(story, step=progress.step)
            run.record.plot()
            if better:
                save_model_folder(model, run.tokenizer, run.config.output_dir / "best")
    progress.evaluation_seconds = run.stopwatch.paused_s


def validation_loss(run: Run, model: TinyStoriesForCausalLM) -> float:
    """Nats per token over every validation token once, shared out among the processes."""
    accelerator = run.accelerator
    with _eager(run.settings.compiled):
        scores = score_stories(
            model,
            run.validation[accelerator.process_index :: accelerator.num_processes],
            eos_token_id=run.tokenizer.eos_token_id,
            batch_size=2 * run.settings.per_device_batch_size,
            autocast=accelerator.autocast(),
        )
    shares = gather_object([(scores.nats.sum(), scores.num_tokens.sum())])
    nats, num_tokens = np.sum(shares, axis=0)
    return float(nats / num_tokens)


def save(run: Run) -> None:
    """last/ to use, a checkpoint to resume from."""
    progress = run.progress
    _catch_up(run)
    if progress.skipped_in_a_row and not (progress.finished or run.stop_agreed):
        return  # in trouble: what is kept are the checkpoints from before it
    with run.stopwatch.paused():
        model = run.model_to_keep()
        if run.accelerator.is_main_process:
            save_model_folder(model, run.tokenizer, run.config.output_dir / "last")
        keep = run.config.train.keep_checkpoints
        save_checkpoint(run.accelerator, run.config.output_dir, progress, keep=keep, average=run.average)
    progress.saving_seconds = run.stopwatch.paused_s


def _skip_unless_finite(run: Run, grad_norm: torch.Tensor) -> bool:
    """Whether the optimizers are to be passed over, as there is no finite gradient.

    Where reading that would wait for the device, they are told on the device, leave everything as it is by
    themselves, and the step is counted when the loop next logs or saves.
    """
    if run.reads_each_step:
        finite = math.isfinite(grad_norm)
        _count_skipped(run, finite=finite)
        return not finite
    finite = torch.isfinite(grad_norm)
    for optimizer in run.optimizers:
        optimizer.optimizer.found_inf = 1.0 - finite.float()  # what torch's fused AdamW asks
    run.unread_finite.append(finite)
    return False


def _count_skipped(run: Run, *, finite: bool, step: int | None = None) -> None:
    args, progress = run.config.train, run.progress
    step = progress.step + 1 if step is None else step
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
    progress.skipped_steps += not finite
    if progress.skipped_in_a_row == 1:
        logger.warning("step %d: loss or gradient is not finite, step skipped", step)
    if progress.skipped_in_a_row >= args.max_skipped_in_a_row:
        raise InputError(
            f"{progress.skipped_in_a_row} steps in a row, to step {step}, gave no finite loss "
            f"and gradient; what was saved before stands; lower train.lr ({args.lr}), lengthen "
            f"train.warmup_steps ({args.warmup_steps}) or set train.mixed_precision to no, and start over "
            "with --train.resume never"
        )


def _catch_up(run: Run) -> None:
    """Read what the steps left on the device: their losses, each then the mean over all processes, and
    which of them were skipped."""
    steps, last = run.unread_finite, run.progress.step
    for i, finite in enumerate(torch.stack(steps).tolist() if steps else []):
        _count_skipped(run, finite=finite, step=last - len(steps) + i + 1)
    steps.clear()
    if run.local_losses:
        losses = run.accelerator.reduce(torch.stack(run.local_losses), reduction="mean")
        run.progress.unlogged_losses += losses.tolist()
        run.local_losses.clear()


def _seed_dropout(run: Run) -> None:
    """Make dropout a function of (seed, step, process), so that no random state has to outlive a restart."""
    key = (run.config.train.seed, run.progress.step, run.accelerator.process_index)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _eager(compiled: bool) -> contextlib.AbstractContextManager:
    """Compiled blocks would be compiled anew for every length of story."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
