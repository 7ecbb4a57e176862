"""Extend a finished run: `train.resume: extend` with a larger `train.max_steps` or `train.max_minutes`.

If the schedule has a constant part, the run goes back to the checkpoint from before its decay: the steps up
to there are those of every longer run (Hägele et al., arXiv 2405.18392). The later ones are trained again.
Otherwise it continues its last checkpoint, optimizer state included, and warms the learning rate up again
(Ibrahim et al., arXiv 2403.08763; see `schedule.lr_factor`).
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from tinystories_slm.config import RunConfig, TrainArgs, load_config, save_config
from tinystories_slm.config.sections import MAY_CHANGE_ON_EXTENSION
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import atomic_write, remove_directory, write_text
from tinystories_slm.runs.records import describe_extension, validation_metrics
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.checkpoints import (
    TrainState,
    check_same_run,
    check_same_source,
    checkpoint_step,
    checkpoints,
    latest_valid_checkpoint,
    read_progress,
    rewrite_progress,
    verify_checkpoint,
)
from tinystories_slm.training.schedule import has_constant_part

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """Checkpoints and options of a run that `train.resume: extend` trains on."""

    checkpoint: Path
    """Checkpoint that the longer run continues."""
    end: TrainState
    """Progress at the end of the finished run."""
    earlier: TrainArgs
    """Options of the finished run."""
    is_interrupted: bool = False
    """Whether an earlier session was killed between the checkpoint and config.yaml."""


def find_extension(config: RunConfig) -> Extension | None:
    """Return how `config` extends the run in `output_dir`; None without `train.resume: extend`, or if it did.

    Raises:
        UserError: the run does not exist, is not finished, has another configuration, is not shorter than
            `config`, or lacks the checkpoint.
    """
    run_dir = config.output_dir
    if config.train.resume != "extend":
        return None
    newest = latest_valid_checkpoint(run_dir)
    if newest is None:
        raise UserError(
            f"train.resume (extend): must find a finished run in output_dir ({run_dir}); train it first, "
            "without this option"
        )
    check_same_run(config, run_dir, may_change=MAY_CHANGE_ON_EXTENSION)
    earlier, end = load_config(RunDir(run_dir).config).train, read_progress(newest)
    if not _differs_in_length(config.train, earlier):
        return None
    if end.extended_steps[-1:] == [end.step] and not end.finished:
        return Extension(newest, end, earlier, is_interrupted=True)
    if not end.finished:
        raise UserError(
            f"train.resume (extend): the run in {run_dir} must be finished first, and is at step {end.step} "
            f"of {earlier.max_steps}; run its own command again, without this option"
        )
    check_same_source(config, run_dir)
    _check_longer(config.train, end)
    return Extension(find_branch(config, newest, end), end, earlier)


def extend_run(config: RunConfig, extension: Extension) -> None:
    """Make the finished run in `output_dir` an unfinished one, which resumes with `config`.

    The order lets the same command repeat what a kill left undone. best/ stays until an evaluation of the
    longer run is better.
    """
    run_dir, step = RunDir(config.output_dir), checkpoint_step(extension.checkpoint)
    if not extension.is_interrupted:
        _record_extension(run_dir, extension, config.train)
        rewrite_progress(extension.checkpoint, _first_progress(extension, config.train))
        # Oldest first: until the last one is gone, the run counts as finished.
        for later in [path for path in checkpoints(run_dir.path) if checkpoint_step(path) > step]:
            remove_directory(later)
    with atomic_write(run_dir.config) as path:
        save_config(config, path)
    logger.info("%s: %s", run_dir.path, describe_extension(run_dir.read_extensions()[-1]))


def _first_progress(extension: Extension, args: TrainArgs) -> TrainState:
    """Return the progress with which the longer run begins."""
    end = extension.end
    constant = has_constant_part(args)
    start = read_progress(extension.checkpoint) if constant else end
    return replace(
        start,
        finished=False,
        best_step=end.best_step,
        best_loss=end.best_loss,
        best_num_stories=end.best_num_stories,
        evaluation_seconds=end.evaluation_seconds,
        saving_seconds=end.saving_seconds,
        time_fraction=0.0,
        warmup_seconds=start.warmup_seconds if constant else end.seconds,
        decay_step=0,
        rewarm_step=0 if constant else end.step,
        extended_steps=[*end.extended_steps, start.step],
    )


def _record_extension(run_dir: RunDir, extension: Extension, args: TrainArgs) -> None:
    """Append the extension to extensions.jsonl, with the metrics of the steps that are trained again."""
    step, end_step = checkpoint_step(extension.checkpoint), extension.end.step
    lines = run_dir.read_metrics()
    record = {
        "from_step": step,
        "end_step": end_step,
        "max_steps": extension.earlier.max_steps,
        "max_minutes": extension.earlier.max_minutes,
        "rewarm_lr_rate": None if has_constant_part(args) else args.rewarm_lr_rate,
        "val_loss": (validation_metrics(lines, end_step) or {}).get("val/loss"),
        "metrics": [line for line in lines if line["step"] > step],
    }
    earlier = [one for one in run_dir.read_extensions() if one.get("end_step") != end_step]
    write_text(run_dir.extensions, "".join(json.dumps(one) + "\n" for one in [*earlier, record]))


def find_branch(config: RunConfig, newest: Path, end: TrainState) -> Path:
    """Return the checkpoint that the longer run continues.

    Raises:
        UserError: the schedule has a constant part, and the checkpoint from before the decay is missing.
    """
    if not has_constant_part(config.train):
        return newest
    found = [path for path in checkpoints(config.output_dir) if checkpoint_step(path) == end.decay_step]
    damage = verify_checkpoint(found[0]) if found else "it is missing"
    if damage:
        name = f"step_{end.decay_step:06d}" if end.decay_step else "none was kept"
        raise UserError(
            f"train.resume (extend): the checkpoint from before the decay ({name}) in {config.output_dir} "
            f"must be intact, but {damage}; start a new run from its model with --model.init_from "
            f"{config.output_dir}/best and another --output_dir"
        )
    return found[0]


def _differs_in_length(args: TrainArgs, earlier: TrainArgs) -> bool:
    return (args.max_steps, args.max_minutes) != (earlier.max_steps, earlier.max_minutes)


def _check_longer(args: TrainArgs, end: TrainState) -> None:
    """Check that a run of `args` has steps and time left after `end`.

    Raises:
        UserError: it has not.
    """
    num_rewarm_steps = 0 if has_constant_part(args) else args.warmup_steps
    if args.max_steps <= end.step + num_rewarm_steps:
        rewarming = f" and the {num_rewarm_steps} of the warm-up" if num_rewarm_steps else ""
        raise UserError(
            f"train.max_steps ({args.max_steps}): must be above the {end.step} steps of the finished run"
            f"{rewarming}; set a larger number"
        )
    if args.max_minutes is not None and 60 * args.max_minutes <= end.seconds:
        raise UserError(
            f"train.max_minutes ({args.max_minutes}): must be above the {end.seconds / 60:.2f} minutes of "
            "the finished run; set a larger number, or null for no limit"
        )
