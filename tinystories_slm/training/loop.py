"""The training loop. Read `train` from top to bottom: it is the whole plot."""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from tinystories_slm.config import RunConfig
from tinystories_slm.errors import InputError
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.generation import generate_stories
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.training.checkpoints import save_checkpoint
from tinystories_slm.training.run import Run, finished, start_run

logger = logging.getLogger(__name__)

SAMPLE_PROMPT = "Once upon a time"


def train(config: RunConfig) -> Path:
    """Train the model that `config` describes, or go on where its run folder stands.

    Returns:
        The run folder: `best/` and `last/` are model folders, `checkpoints/` resumes the run, and
        metrics.jsonl, loss.png and samples.md tell how it went.

    Raises:
        InputError: a configuration, data or checkpoint that cannot be right; nothing was changed.
    """
    args = config.train
    if finished(config):
        logger.info("%s is trained to its last step already", config.output_dir)
        return config.output_dir
    run = start_run(config)
    while run.progress.step < args.max_steps:
        update = train_step(run)
        if run.due(args.log_every):
            log(run, update)
        if run.due(args.eval_every):
            with run.stopwatch.paused():
                evaluate(run)
        if run.due(args.save_every):
            with run.stopwatch.paused():
                save(run)
    run.display.close()
    if run.accelerator.is_main_process:
        best = run.progress
        logger.info("best validation loss %.4f at step %d", best.best_loss, best.best_step)
    run.accelerator.end_training()
    return config.output_dir


def train_step(run: Run) -> dict[str, float | torch.Tensor]:
    """One optimizer step: forward and backward over the batch, clip, update.

    Returns:
        The learning rate it ran at and the gradient's norm before clipping (on the device).
    """
    accelerator, args, model = run.accelerator, run.config.train, run.prepared_model
    model.train()
    _seed_dropout(run)
    step_loss = torch.zeros((), device=accelerator.device)
    for input_ids in micro_batches(run):  # (per_device_batch_size, seq_len)
        with accelerator.accumulate(model):
            # Every window is full, so the mean over micro-batches is the mean over the batch's tokens.
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            accelerator.backward(loss)
            step_loss += loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            for optimizer in run.optimizers:  # which do nothing until the last micro-batch
                optimizer.step()
                optimizer.zero_grad()
    update = {"train/lr": run.schedulers[0].get_last_lr()[0], "train/grad_norm": grad_norm}
    for scheduler in run.schedulers:
        scheduler.step()
    run.unlogged_losses.append(step_loss)
    run.progress.step += 1
    run.display.advance()
    return update


def micro_batches(run: Run) -> Iterator[torch.Tensor]:
    """This process's share of the step's batch, (per_device_batch_size, seq_len) int64 at a time."""
    accelerator, args = run.accelerator, run.config.train
    share = args.batch_size // accelerator.num_processes
    first = accelerator.process_index * share
    rows = run.windows.batch(run.progress.step, args.batch_size, rows=slice(first, first + share))
    yield from torch.from_numpy(rows).to(accelerator.device).split(args.per_device_batch_size)


def log(run: Run, update: dict[str, float | torch.Tensor]) -> None:
    """A line of metrics.jsonl: the mean loss since the last one, and how it was come by."""
    losses = torch.stack(run.unlogged_losses)
    loss = run.accelerator.reduce(losses.mean(), reduction="mean").item()
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {run.progress.step}; lower train.lr ({run.config.train.lr}) or set "
            "train.mixed_precision to no, and start over with --train.resume never"
        )
    metrics = {
        "train/loss": loss,
        **{name: float(value) for name, value in update.items()},
        "train/tokens_per_second": len(losses) * run.tokens_per_step / run.stopwatch.elapsed_s(),
    }
    run.record.log(metrics, step=run.progress.step, tokens=run.tokens)
    run.display.show(run.progress.step, metrics)
    run.unlogged_losses.clear()
    run.stopwatch.restart()


def evaluate(run: Run) -> None:
    """Validation loss, a story, the curves; and best/, if there has been no better model."""
    args, progress = run.config.train, run.progress
    loss = validation_loss(run)
    metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
    run.record.log(metrics, step=progress.step, tokens=run.tokens)
    run.display.show(progress.step, metrics)
    better = loss < progress.best_loss
    if better:
        progress.best_loss, progress.best_step = loss, progress.step
    if run.accelerator.is_main_process:
        with _eager(args.compile):
            [story] = generate_stories(
                run.model,
                run.tokenizer,
                [SAMPLE_PROMPT],
                max_new_tokens=run.config.data.seq_len,
                seed=args.seed,
            )
        run.record.sample(story, step=progress.step)
        run.record.plot()
        if better:
            save_model_folder(run.model, run.tokenizer, run.config.output_dir / "best")


def validation_loss(run: Run) -> float:
    """Nats per token over every validation token once, shared out among the processes."""
    accelerator = run.accelerator
    with _eager(run.config.train.compile):
        scores = score_stories(
            run.model,
            run.validation[accelerator.process_index :: accelerator.num_processes],
            eos_token_id=run.tokenizer.eos_token_id,
            batch_size=2 * run.config.train.per_device_batch_size,
            autocast=accelerator.autocast(),
        )
    shares = gather_object([(scores.nats.sum(), scores.num_tokens.sum())])
    nats, num_tokens = np.sum(shares, axis=0)
    return float(nats / num_tokens)


def save(run: Run) -> None:
    """last/ to use, a checkpoint to resume from."""
    if run.accelerator.is_main_process:
        save_model_folder(run.model, run.tokenizer, run.config.output_dir / "last")
    keep = run.config.train.keep_checkpoints
    save_checkpoint(run.accelerator, run.config.output_dir, run.progress, keep=keep)


def _seed_dropout(run: Run) -> None:
    """Make dropout a function of (seed, step, process), so that no random state has to outlive a restart."""
    key = (run.config.train.seed, run.progress.step, run.accelerator.process_index)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _eager(compiled: bool) -> contextlib.AbstractContextManager:
    """Compiled blocks would be compiled anew for every length of story."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
