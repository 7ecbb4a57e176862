"""Checkpoints: everything that resumes a run, in `checkpoints/step_000200/`, whole or not at all.

A checkpoint is written under another name, synced to the disk and renamed; `checkpoint.json` holds
where the run stood and the SHA-256 of that and of every other file, so that a damaged one is noticed.
Nothing in it is trusted to be a pickle: weights are safetensors, `torch.load(weights_only=True)` reads
the rest.
"""

import hashlib
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from tinystories_slm.config import RunConfig, as_plain, load_config
from tinystories_slm.data.prepare import Manifest
from tinystories_slm.errors import InputError
from tinystories_slm.model_folder import sync_folder
from tinystories_slm.training.averaging import WeightAverage

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""In a run folder: the manifest of the data that the run is trained on."""
_CHECKPOINT = "checkpoint.json"

# What may differ between the two halves of a run: where it is, how it is watched and cut into pieces.
_FREE_TO_CHANGE = {
    "output_dir",
    "data.data_dir",
    "data.num_workers",
    "train.resume",
    "train.log_every",
    "train.tracker",
    "train.eval_every",
    "train.eval_stories",
    "train.save_every",
    "train.keep_checkpoints",
    "train.per_device_batch_size",
    "train.compile",
    "train.attention",
}


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    finished: bool = False
    """Whether the last step or the end of the time is reached."""
    best_step: int = 0
    """The step of the model in best/."""
    best_loss: float = float("inf")
    """Its validation loss, in nats per token."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite, and which changed nothing."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Wall-clock seconds so far, over all sessions, from the start of `train()`."""
    warmup_seconds: float = 0.0
    """The same at the end of the warm-up."""
    evaluation_seconds: float = 0.0
    """How long the last evaluation took: the one at the end will take as long."""
    saving_seconds: float = 0.0
    """The same of the last save, which in a checkpoint is the one before it."""
    time_fraction: float = 0.0
    """Share of the time after the warm-up that is used up; 0 where the run has no time limit."""
    unlogged_losses: list[float] = field(default_factory=list)
    """Of the steps since the last line of metrics.jsonl, over all processes."""


def save_checkpoint(
    accelerator: Accelerator,
    run_dir: Path,
    progress: Progress,
    *,
    keep: int,
    average: WeightAverage | None = None,
) -> Path:
    """Write the checkpoint of `progress.step`, rename it into place, drop the oldest past `keep`."""
    folder = run_dir / "checkpoints" / f"step_{progress.step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        for leftover in folder.parent.glob("*.partial"):  # of a run that was killed while it saved
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    # It warns of every tied weight that it leaves out; loading ties them again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if average:
            average.save(partial)
        record = {"progress": asdict(progress), "sha256": _sha256_of_files(partial)}
        record["sha256"][_CHECKPOINT] = _sha256_of_progress(record["progress"])
        (partial / _CHECKPOINT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        sync_folder(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(folder.parent)
        # A later one is damaged, as the run went on from before it: it would outlast every good one.
        later = [path for path in checkpoints(run_dir) if step_of(path) > progress.step]
        for old in (*later, *checkpoints(run_dir)[: -keep - len(later)]):
            shutil.rmtree(old)
    return folder


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, damaged ones among them, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted((folder for folder in folders if re.fullmatch(r"step_\d+", folder.name)), key=step_of)


def newest_intact(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files are what was written; None where there is no checkpoint.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    found = checkpoints(run_dir)
    for folder in reversed(found):
        damage = damage_of(folder)
        if damage is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s); looking at the one before it", folder, damage)
    if found:
        raise InputError(
            f"every checkpoint in {run_dir / 'checkpoints'} is damaged; start over with --train.resume "
            "never, or begin another run from best/ with --model.init_from"
        )
    return None


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with its files, by their checksums; None where nothing is."""
    try:
        record = json.loads((checkpoint / _CHECKPOINT).read_text(encoding="utf-8"))
        written, read = record["sha256"], _sha256_of_files(checkpoint)
        read[_CHECKPOINT] = _sha256_of_progress(record["progress"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_CHECKPOINT}: {' '.join(str(error).split())}"
    for name in sorted(written):
        if name not in read:
            return f"{name} is missing"
        if written[name] != read[name]:
            return f"{name} is not what was written"
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when it was written."""
    return int(checkpoint.name.removeprefix("step_"))


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood.

    Raises:
        InputError: it is damaged.
    """
    try:
        record = json.loads((checkpoint / _CHECKPOINT).read_text(encoding="utf-8"))
        return Progress(**record["progress"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {checkpoint} is damaged ({_CHECKPOINT}: {error})") from error


def load_checkpoint(accelerator: Accelerator, folder: Path, average: WeightAverage | None = None) -> None:
    """Restore model, optimizers, gradient scaler and the average of the weights, on every process.

    Raises:
        InputError: the checkpoint holds weights of another shape, or what no checkpoint of ours holds.
    """
    try:
        accelerator.load_state(str(folder))
        if average:
            average.load(folder)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"checkpoint {folder} does not fit this run or is damaged ({reason[:200]}); choose another "
            "--output_dir, delete the checkpoint to resume from the one before, or pass --train.resume never"
        ) from error
    # Its count of micro-batches: a checkpoint lies between batches, however they are cut from here on.
    accelerator.step = 0


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Refuse to go on with a run that was started with another configuration.

    Raises:
        InputError: with every value that differs, then and now.
    """
    if not (run_dir / "config.yaml").is_file():
        raise InputError(
            f"{run_dir} has checkpoints but no config.yaml to say of what; choose another --output_dir, or "
            "start over with --train.resume never"
        )
    then, now = _flat(as_plain(load_config(run_dir / "config.yaml"))), _flat(as_plain(config))
    differences = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in now
        if name not in _FREE_TO_CHANGE and then.get(name) != now.get(name)
    ]
    if differences:
        raise InputError(
            f"output_dir ({run_dir}) holds a run with another configuration: {', '.join(differences)}; "
            "choose another --output_dir, or start over with --train.resume never"
        )


def check_same_data(manifest: Manifest, run_dir: Path) -> None:
    """Refuse to go on with a run on other tokens than it began with.

    Raises:
        InputError: with what differs, or the run's own manifest is gone.
    """
    try:
        then = Manifest.load(run_dir / MANIFEST)
    except InputError as error:
        raise InputError(
            f"{run_dir / MANIFEST}, which says what data the run is trained on, is gone or damaged; if it is "
            f"what is in data.data_dir now, copy manifest.json from there"
        ) from error
    differences = [
        f"{name} was {getattr(then, name)!r} and is {getattr(manifest, name)!r}"
        for name in ("source", "revision", "tokenizer_sha256", "splits")
        if getattr(then, name) != getattr(manifest, name)
    ]
    if differences:
        raise InputError(
            f"output_dir ({run_dir}) holds a run on other data: {', '.join(differences)}; choose another "
            "--output_dir, or start over with --train.resume never"
        )


def _sha256_of_files(folder: Path) -> dict[str, str]:
    """Of every file but checkpoint.json, by its path in the folder."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _CHECKPOINT:
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _sha256_of_progress(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
