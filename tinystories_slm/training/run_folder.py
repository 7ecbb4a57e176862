"""The run folder: claiming it, finding where to go on, and clearing it for a new run."""

import math
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from tinystories_slm.config import RunConfig, save_config
from tinystories_slm.data.artifacts import finished_file
from tinystories_slm.data.prepare import Manifest
from tinystories_slm.errors import InputError
from tinystories_slm.model_folder import restore_folder
from tinystories_slm.training.checkpoints import (
    MANIFEST,
    Progress,
    check_same_run,
    checkpoints,
    damage_of,
    newest_intact,
    read_progress,
)

_FOLDERS = ("checkpoints", "best", "last")
_RECORDS = (
    "config.yaml",  # first: without it the rest is no run's
    "metrics.jsonl",
    "samples.md",
    "loss.png",
    "report.html",
    "environment.json",
    "tracker.json",
    "evaluation.json",
    "stories.jsonl",
)


def claim_run_folder(config: RunConfig, lock: FileLock) -> Path | None:
    """Lock the run folder, and find the checkpoint to go on from.

    Raises:
        InputError: another run is in it, it is none of ours, or its checkpoints do not fit or are damaged.
    """
    run_dir, resume = config.output_dir, config.train.resume
    _check_run_folder(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"output_dir ({run_dir}) is in use: another process trains there; wait for it, stop it, or "
            "choose another --output_dir"
        ) from None
    try:
        for name in ("best", "last"):
            restore_folder(run_dir / name)
        if resume == "never":
            return None
        if checkpoints(run_dir):
            check_same_run(config, run_dir)
            return newest_intact(run_dir)
        _check_nothing_is_lost(config)
        return None if resume == "auto" else _named_checkpoint(Path(resume), config)
    except BaseException:
        leave_run_folder(run_dir, lock)
        raise


def leave_run_folder(run_dir: Path, lock: FileLock) -> None:
    """Give it free, and remove it if a refused run has made it and nothing else."""
    # While it is still locked: afterwards it may be another's.
    if [path.name for path in run_dir.iterdir()] == ["run.lock"]:
        shutil.rmtree(run_dir)
    lock.release()


def check_resume(config: RunConfig) -> None:
    """Refuse a `train.resume` that would be passed over, as the run folder goes on from its newest.

    Raises:
        InputError: it names an older checkpoint of the run folder itself.
    """
    found = checkpoints(config.output_dir)
    if config.train.resume in ("auto", "never") or not found:
        return
    named = Path(config.train.resume).resolve()
    if named != found[-1].resolve() and run_of(named) == config.output_dir.resolve():
        raise InputError(
            f"train.resume ({config.train.resume}) is not the newest checkpoint of output_dir "
            f"({config.output_dir}), where the run goes on from with auto; to go on from this one choose "
            "another --output_dir"
        )


def _check_nothing_is_lost(config: RunConfig) -> None:
    """Refuse to start over, unasked, in a folder whose models are all that is left of a run.

    Raises:
        InputError: it is another run, or its checkpoints were taken away.
    """
    run_dir = config.output_dir
    if not any((run_dir / name).exists() for name in ("best", "last")):
        return
    check_same_run(config, run_dir)
    if not (run_dir / "checkpoints").exists():  # which a run makes as it begins
        raise InputError(
            f"output_dir ({run_dir}) holds a trained model and no checkpoints to go on from; choose another "
            "--output_dir, or replace it with --train.resume never"
        )


def _named_checkpoint(path: Path, config: RunConfig) -> Path:
    """The checkpoint that `train.resume` names: of another run folder, to branch off from it.

    Raises:
        InputError: it is none, damaged, or of another configuration.
    """
    if not re.fullmatch(r"step_\d+", path.name) or not path.is_dir():
        raise InputError(
            f"train.resume ({path}) must be auto, never, or a checkpoint such as "
            "runs/9m/checkpoints/step_002000"
        )
    if damage := damage_of(path):
        raise InputError(f"train.resume ({path}) is damaged: {damage}; name another checkpoint")
    check_same_run(config, run_of(path))
    return path


def run_of(checkpoint: Path) -> Path:
    return checkpoint.absolute().parent.parent


def prepare_run_folder(
    config: RunConfig, manifest: Manifest, checkpoint: Path | None, progress: Progress
) -> None:
    """An empty folder for a new run, the other run's history for a branch, as it is for a resumed one."""
    run_dir = config.output_dir
    resumed = checkpoint is not None and run_of(checkpoint) == run_dir.absolute()
    if not resumed:
        _clear(run_dir)
    # First, as `_check_run_folder` asks for it; and never half of it, or the run would be another's.
    with finished_file(run_dir / "config.yaml") as path:
        save_config(config, path)
    if not resumed:
        (run_dir / "checkpoints").mkdir()
        if checkpoint:
            _copy_history(run_of(checkpoint), run_dir, progress)
        manifest.save(run_dir / MANIFEST)


def _copy_history(source: Path, run_dir: Path, progress: Progress) -> None:
    """What the run that `run_dir` branches off from has told so far, and its best model.

    A best model of later than the branch is not this run's: then the next evaluation makes one.
    """
    for name in ("metrics.jsonl", "samples.md"):
        if (source / name).is_file():
            shutil.copy(source / name, run_dir / name)
    newest = newest_intact(source)
    if newest and read_progress(newest).best_step == progress.best_step and (source / "best").is_dir():
        shutil.copytree(source / "best", run_dir / "best")
    else:
        progress.best_step, progress.best_loss = 0, math.inf


def _check_run_folder(run_dir: Path) -> None:
    """Refuse a folder that cannot be made or written to, or whose contents are not a run's.

    Raises:
        InputError: nothing was touched.
    """
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"output_dir ({run_dir}) cannot be written to; choose another --output_dir")
    others = [name for name in _FOLDERS if (run_dir / name).exists()]
    if others and not (run_dir / "config.yaml").is_file():
        raise InputError(
            f"output_dir ({run_dir}) holds {', '.join(others)} that no run of this program made (there is no "
            "config.yaml); choose another --output_dir"
        )


def _clear(run_dir: Path) -> None:
    """Drop what a run before this one left, and nothing else."""
    for name in (*_FOLDERS, "best.old", "best.partial", "last.old", "last.partial"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in _RECORDS:
        (run_dir / name).unlink(missing_ok=True)
