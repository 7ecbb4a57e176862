"""Checkpoints: everything that resumes a run, in `checkpoints/step_000200/`, complete or absent.

A checkpoint is written under a temporary name, synced to disk and renamed. `checkpoint.json` holds the
`TrainState`, its SHA-256 and that of every other file, so that damage is detected. No file is unpickled:
weights are safetensors, and `torch.load(weights_only=True)` reads the rest. `checkpoint_tensors` has the
whole files, `sharded_checkpoints` those of each process.
"""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from tinystories_slm.config import RunConfig, flatten, load_config, to_dict
from tinystories_slm.config.sections import MAY_CHANGE_ON_EXTENSION, MAY_CHANGE_ON_RESUME, CheckpointArgs
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import apply_umask, fsync_directory, remove_directory, write_text
from tinystories_slm.training.checkpoint_tensors import TrainedState, read_whole, write_whole
from tinystories_slm.training.retention import steps_to_delete
from tinystories_slm.training.sharded_checkpoints import CheckpointWriter, is_sharded_checkpoint, read_shards

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""File name in the run directory: the manifest of the data that the run trains on."""
_CHECKPOINT = "checkpoint.json"


@dataclass
class TrainState:
    """Progress of a run; part of every checkpoint."""

    step: int = 0
    """Number of finished optimizer steps."""
    finished: bool = False
    """Whether the run reached its last step or its time limit."""
    best_step: int = 0
    """Step of the model in best/."""
    best_loss: float = float("inf")
    """Validation loss of the model in best/, in nats per token."""
    best_num_stories: int = 0
    """Number of validation stories, the first ones, of `best_loss`; 0 in checkpoints of earlier versions."""
    skipped_steps: int = 0
    """Number of steps without effect, because loss or gradient was not finite."""
    consecutive_skipped_steps: int = 0
    seconds: float = 0.0
    """Wall-clock seconds over all sessions, each from the start of `train()`."""
    warmup_seconds: float = 0.0
    """Value of `seconds` at the end of the warm-up."""
    evaluation_seconds: float = 0.0
    """Duration of the last evaluation, the estimate for the final one."""
    saving_seconds: float = 0.0
    """Duration of the last save; in a checkpoint, of the save before it."""
    time_fraction: float = 0.0
    """Used share of the time after the warm-up; 0 without a time limit."""
    decay_step: int = 0
    """Step of the checkpoint from before the decay, which stays for `train.resume: extend`; 0 for none."""
    extended_steps: list[int] = field(default_factory=list)
    """Steps from which the run was extended, in the order of the extensions."""
    rewarm_step: int = 0
    """Step from which the learning rate warms up again after an extension; 0 for none."""
    window_order: int = 1
    """`packing.ORDER_VERSION` of the batches; 1 in checkpoints of earlier versions."""
    stream: dict[str, Any] | None = None
    """`stream_position` of the next step with `data.streaming`; null without."""
    unlogged_losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last line of metrics.jsonl, averaged over all processes."""


def save_checkpoint(
    state: TrainedState,
    run_dir: Path,
    progress: TrainState,
    *,
    args: CheckpointArgs,
    writer: CheckpointWriter | None = None,
) -> None:
    """Write the checkpoint of `progress.step` atomically, and delete those that `args` does not keep.

    With `writer` the processes write their shards, and this returns as soon as they are copied. `writer.wait`
    waits for the end.

    Raises:
        UserError: the previous checkpoint of `writer` could not be written.
    """
    if writer:
        writer.wait()
    accelerator = state.accelerator
    folder = run_dir / "checkpoints" / f"step_{progress.step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        for leftover in folder.parent.glob("step_*.partial"):  # of a run that was killed during a save
            remove_directory(leftover)
    accelerator.wait_for_everyone()
    complete = functools.partial(_complete, partial, deepcopy(progress), args)
    if writer:
        writer.start(state, partial, complete)
        return
    write_whole(state, partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        apply_umask(partial)
        complete()


def _complete(partial: Path, progress: TrainState, args: CheckpointArgs) -> None:
    """Write checkpoint.json, rename the folder, and delete the checkpoints that `args` does not keep."""
    folder = partial.with_suffix("")
    record = {"progress": asdict(progress), "sha256": _sha256_of_files(partial)}
    record["sha256"][_CHECKPOINT] = _sha256_of_progress(record["progress"])
    (partial / _CHECKPOINT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    fsync_directory(partial)
    remove_directory(folder)
    partial.rename(folder)
    fsync_directory(folder.parent)
    by_step = {checkpoint_step(path): path for path in checkpoints(folder.parent.parent)}
    for step in steps_to_delete(list(by_step), progress.step, args):
        if step != progress.decay_step:
            remove_directory(by_step[step])


def rewrite_progress(checkpoint: Path, progress: TrainState) -> None:
    """Replace the `TrainState` of a checkpoint atomically."""
    record = _read_record(checkpoint) | {"progress": asdict(progress)}
    record["sha256"][_CHECKPOINT] = _sha256_of_progress(record["progress"])
    write_text(checkpoint / _CHECKPOINT, json.dumps(record, indent=2) + "\n")


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints, damaged ones included, oldest first."""
    folder = run_dir / "checkpoints"
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):  # a run that starts over removes it
        return []
    return sorted((folder / name for name in names if re.fullmatch(r"step_\d+", name)), key=checkpoint_step)


def latest_valid_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose checksums match; None if no checkpoint exists.

    Raises:
        UserError: every checkpoint is damaged.
    """
    found = checkpoints(run_dir)
    for folder in reversed(found):
        damage = verify_checkpoint(folder)
        if damage is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s); trying the previous one", folder, damage)
    if found:
        raise UserError(
            f"every checkpoint in {run_dir / 'checkpoints'} is damaged; start over with --train.resume "
            "never, or initialize another run from best/ with --model.init_from"
        )
    return None


def verify_checkpoint(checkpoint: Path) -> str | None:
    """Return the damage that the checksums show, as text; None if there is none."""
    try:
        record = _read_record(checkpoint)
        written, read = dict(record["sha256"]), _sha256_of_files(checkpoint)
        read[_CHECKPOINT] = _sha256_of_progress(record["progress"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{_CHECKPOINT}: {' '.join(str(error).split())}"
    for name in sorted(written):
        if name not in read:
            return f"{name} is missing"
        if written[name] != read[name]:
            return f"{name} has another checksum than when written"
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps that the checkpoint's name states."""
    return int(checkpoint.name.removeprefix("step_"))


def read_progress(checkpoint: Path) -> TrainState:
    """Read the `TrainState` of a checkpoint.

    Raises:
        UserError: checkpoint.json is damaged.
    """
    try:
        progress = _read_record(checkpoint)["progress"]
        if "skipped_in_a_row" in progress:  # field name in checkpoints of earlier versions
            progress["consecutive_skipped_steps"] = progress.pop("skipped_in_a_row")
        return TrainState(**progress)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged ({_CHECKPOINT}: {error})") from error


def load_checkpoint(state: TrainedState, folder: Path) -> None:
    """Restore model, optimizers, gradient scaler and EMA, on every process.

    Raises:
        UserError: the weights have another shape, or a file cannot be read safely.
    """
    try:
        read = read_shards if is_sharded_checkpoint(folder) else read_whole
        read(state, folder)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"checkpoint {folder} does not fit this run or is damaged ({reason[:200]}); choose another "
            "--output_dir, delete the checkpoint to resume from the one before, or pass --train.resume never"
        ) from error
    # Accelerate's count of micro-batches. A checkpoint lies between batches, and the micro-batch may change.
    state.accelerator.step = 0


def check_same_run(config: RunConfig, run_dir: Path, *, may_change: Collection[str] = ()) -> None:
    """Check that the run in `run_dir` has the configuration `config`, except `MAY_CHANGE_ON_RESUME`.

    Options in `may_change` may differ, too.

    Raises:
        UserError: lists every option that differs, with both values.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"output_dir ({run_dir}) has checkpoints but no config.yaml; choose another --output_dir, or "
            "start over with --train.resume never"
        )
    then = flatten(to_dict(load_config(run_dir / "config.yaml")))
    now = flatten(to_dict(config))
    different = [
        name
        for name in now
        if name not in MAY_CHANGE_ON_RESUME and name not in may_change and then.get(name) != now.get(name)
    ]
    if different:
        listed = ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in different)
        is_length = MAY_CHANGE_ON_EXTENSION.issuperset(different)
        train_on = ", train a finished run on with --train.resume extend," if is_length else ","
        raise UserError(
            f"output_dir ({run_dir}) holds a run with another configuration: {listed}; "
            f"choose another --output_dir{train_on} or start over with --train.resume never"
        )


def check_same_data(manifest: Manifest, run_dir: Path) -> None:
    """Check that the run in `run_dir` was started on the data of `manifest`.

    Raises:
        UserError: lists every difference; or the run's own manifest is missing.
    """
    try:
        then = Manifest.load(run_dir / MANIFEST)
    except UserError as error:
        raise UserError(
            f"{run_dir / MANIFEST}, the record of the run's data, is missing or damaged; if the run uses the "
            "data in data.data_dir, copy manifest.json from there"
        ) from error
    pairs = [(name, then.provenance, manifest.provenance) for name in ("source", "revision")]
    pairs += [(name, then, manifest) for name in ("tokenizer_sha256", "splits")]
    differences = [
        f"{name} was {getattr(old, name)!r} and is {getattr(new, name)!r}"
        for name, old, new in pairs
        if getattr(old, name) != getattr(new, name)
    ]
    if differences:
        raise UserError(
            f"output_dir ({run_dir}) holds a run with other data: {', '.join(differences)}; choose another "
            "--output_dir, or start over with --train.resume never"
        )


def check_same_source(config: RunConfig, run_dir: Path) -> None:
    """Check that the source still has the stories that the finished run in `run_dir` was trained on.

    A source that no longer exists is logged.

    Raises:
        UserError: the source has changed; the message names the old and new revision.
    """
    if not (run_dir / MANIFEST).exists():
        return
    if differences := Manifest.load(run_dir / MANIFEST).provenance.differences(config.data):
        raise UserError(
            f"output_dir ({run_dir}) holds a finished run on other stories: {'; '.join(differences)}; "
            "to train a new model, set another --output_dir and --data.data_dir, "
            f"or delete {run_dir} and {config.data.data_dir}"
        )


def _read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / _CHECKPOINT
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path} must be a regular file")
    return json.loads(path.read_text(encoding="utf-8"))


def _sha256_of_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except checkpoint.json, by relative path."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _CHECKPOINT:
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _sha256_of_progress(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()
