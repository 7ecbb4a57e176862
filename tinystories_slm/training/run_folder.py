"""The run directory: lock it, find the checkpoint to resume, and prepare it for a run."""

import logging
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tinystories_slm.config import RunConfig, save_config
from tinystories_slm.config.sections import RESUME_MODES
from tinystories_slm.data.raw_stories import check_apart, check_data_dir
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import acquire_lock, atomic_write, recover_directory, remove_directory
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.checkpoints import (
    MANIFEST,
    TrainState,
    check_same_run,
    checkpoints,
    latest_valid_checkpoint,
    read_progress,
    verify_checkpoint,
)
from tinystories_slm.training.extension import extend_run, find_extension
from tinystories_slm.training.restore import restore_model_folder

logger = logging.getLogger(__name__)

_NAMES = RunDir(Path())
_DIRECTORIES = tuple(path.name for path in (_NAMES.checkpoints, _NAMES.best, _NAMES.last, _NAMES.steps))
_FILES = tuple(
    path.name
    for path in (
        _NAMES.config,  # deleted first: without it, the rest does not count as a run
        _NAMES.metrics,
        _NAMES.samples,
        _NAMES.loss_plot,
        _NAMES.report,
        _NAMES.environment,
        _NAMES.tracker,
        _NAMES.evaluation,
        _NAMES.stories,
        _NAMES.extensions,
    )
)


def lock_run_dir(config: RunConfig, lock: FileLock) -> Path | None:
    """Lock the run directory and return the checkpoint to resume; None for a new run.

    Raises:
        UserError: another process uses the directory, it is not a run directory or contains the source of
            the stories, or its checkpoints are damaged or of another configuration.
    """
    run_dir, resume = config.output_dir, config.train.resume
    _check_run_dir(run_dir)
    _check_source_apart(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        acquire_lock(lock)
    except Timeout:
        raise UserError(
            f"output_dir ({run_dir}) is in use by another process; wait for it, stop it, or choose "
            "another --output_dir"
        ) from None
    try:
        for name in ("best", "last"):
            recover_directory(run_dir / name)
        if resume == "never":
            return None
        if extension := find_extension(config):
            extend_run(config, extension)
        if checkpoints(run_dir):
            check_same_run(config, run_dir)
            return latest_valid_checkpoint(run_dir)
        _check_models_not_overwritten(config)
        return None if resume == "auto" else _named_checkpoint(expand_user(resume), config)
    except BaseException:
        release_run_dir(run_dir, lock)
        raise


def release_run_dir(run_dir: Path, lock: FileLock) -> None:
    """Unlock the run directory, and delete it if it contains nothing but the lock file."""
    # Delete before unlocking: afterwards another process may have locked it.
    if [path.name for path in run_dir.iterdir()] == [_NAMES.lock.name]:
        RunDir(run_dir).lock.unlink()
        with suppress(OSError):  # a symbolic link or the root of a file system
            run_dir.rmdir()
    lock.release()


def check_resume(config: RunConfig) -> None:
    """Check that `train.resume` does not name an older checkpoint of the run directory itself.

    The run directory always resumes from its newest checkpoint, so the option would have no effect.

    Raises:
        UserError: it names an older checkpoint.
    """
    found = checkpoints(config.output_dir)
    if config.train.resume in RESUME_MODES or not found:
        return
    named = expand_user(config.train.resume).resolve()
    if named != found[-1].resolve() and run_dir_of(named) == config.output_dir.resolve():
        raise UserError(
            f"train.resume ({config.train.resume}) is not the newest checkpoint of output_dir "
            f"({config.output_dir}), which auto resumes; to resume from this one, choose another --output_dir"
        )


def _check_models_not_overwritten(config: RunConfig) -> None:
    """Check that a new run would not overwrite the models of a run whose checkpoints were deleted.

    Raises:
        UserError: the models are of another run, or of this run without its checkpoints directory.
    """
    run_dir = config.output_dir
    if not any((run_dir / name).exists() for name in ("best", "last")):
        return
    check_same_run(config, run_dir)
    if not (run_dir / "checkpoints").exists():  # a run creates it at its start
        raise UserError(
            f"output_dir ({run_dir}) holds a trained model but no checkpoints to resume; choose another "
            "--output_dir, or replace the model with --train.resume never"
        )


def _named_checkpoint(path: Path, config: RunConfig) -> Path:
    """Return the checkpoint that `train.resume` names, of another run directory to branch from.

    Raises:
        UserError: it is not a checkpoint, is damaged, or has another configuration.
    """
    if not re.fullmatch(r"step_\d+", path.name) or not path.is_dir():
        raise UserError(
            f"train.resume ({path}) must be auto, never, extend, or a checkpoint such as "
            "runs/9m/checkpoints/step_002000"
        )
    if damage := verify_checkpoint(path):
        raise UserError(f"train.resume ({path}) is damaged: {damage}; name another checkpoint")
    check_same_run(config, run_dir_of(path))
    return path


def run_dir_of(checkpoint: Path) -> Path:
    """Return the run directory that contains `checkpoint`."""
    return checkpoint.absolute().parent.parent


def prepare_run_dir(
    config: RunConfig, manifest: Manifest, checkpoint: Path | None, progress: TrainState
) -> None:
    """Prepare the run directory: empty for a new run, with the history of the other run for a branch.

    If the run resumes its own checkpoint, only config.yaml is written again, and best/ if it is missing.
    """
    run_dir = config.output_dir
    resumed = checkpoint is not None and run_dir_of(checkpoint) == run_dir.absolute()
    if not resumed:
        _delete_previous_run(run_dir)
    # First, because `_check_run_dir` requires it. Atomically: half a file would be another configuration.
    with atomic_write(RunDir(run_dir).config) as path:
        save_config(config, path)
    if resumed:
        _restore_best(config, progress)
        _delete_later_steps(run_dir, progress.step)
    else:
        RunDir(run_dir).checkpoints.mkdir()
        if checkpoint:
            _copy_history(run_dir_of(checkpoint), run_dir, progress)
        manifest.save(run_dir / MANIFEST)


def _delete_later_steps(run_dir: Path, step: int) -> None:
    """Delete what steps/ holds beside the model folders up to `step`: the run trains the later ones again.

    A run with a time limit may end before them, or reach them with another learning rate.
    """
    steps = RunDir(run_dir)
    kept = {folder.name for number, folder in steps.kept_steps().items() if number <= step}
    for path in steps.steps.glob("*step_*"):
        if path.name not in kept:
            remove_directory(path)


def _restore_best(config: RunConfig, progress: TrainState) -> None:
    """Write best/ again if it is missing; if no checkpoint has its step, the next evaluation writes it."""
    best = RunDir(config.output_dir).best
    if best.is_dir() or not progress.best_step:
        return
    if not restore_model_folder(config, best, progress.best_step):
        logger.warning(
            "%s is missing, and no checkpoint of its step %d is left; the next evaluation writes it",
            best, progress.best_step,
        )  # fmt: skip
        progress.best_step, progress.best_loss = 0, math.inf


def _copy_history(source: Path, run_dir: Path, progress: TrainState) -> None:
    """Copy metrics, samples, kept steps and the best model of the run that `run_dir` branches from.

    A best model from after the branch point is not copied. The next evaluation then writes best/.
    """
    for name in (_NAMES.metrics, _NAMES.samples, _NAMES.extensions):
        if (source / name).is_file():
            shutil.copy(source / name, run_dir / name)
    for step, folder in RunDir(source).kept_steps().items():
        if step <= progress.step:
            shutil.copytree(folder, RunDir(run_dir).step(step))
    newest = latest_valid_checkpoint(source)
    if newest and read_progress(newest).best_step == progress.best_step and (source / "best").is_dir():
        shutil.copytree(source / "best", run_dir / "best")
    else:
        progress.best_step, progress.best_loss = 0, math.inf


def _check_run_dir(run_dir: Path) -> None:
    """Check that the directory is writable, and has a config.yaml if it has models or checkpoints.

    Raises:
        UserError: it cannot be used; no file was changed.
    """
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output_dir ({run_dir}) cannot be written to; choose another --output_dir")
    RunDir(run_dir).check_files()
    others = [name for name in _DIRECTORIES if (run_dir / name).exists()]
    if others and not RunDir(run_dir).config.is_file():
        raise UserError(
            f"output_dir ({run_dir}) holds {', '.join(others)} but no config.yaml, so it is not a run "
            "directory; choose another --output_dir"
        )


def _check_source_apart(config: RunConfig) -> None:
    """Check that the files of a new run would not mix with the stories, or replace them.

    Raises:
        UserError: the source is inside, above or equal to a folder of the run.
    """
    check_data_dir(config.data)
    if config.train.resume == "never" or not checkpoints(config.output_dir):
        check_apart(config.data.source, "output_dir", config.output_dir)


def _delete_previous_run(run_dir: Path) -> None:
    """Delete the files of a previous run, and no others."""
    for name in (*_DIRECTORIES, "best.partial", ".best.replaced", "last.partial", ".last.replaced"):
        remove_directory(run_dir / name)
    for name in _FILES:
        (run_dir / name).unlink(missing_ok=True)
