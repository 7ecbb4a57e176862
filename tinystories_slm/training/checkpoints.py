"""Checkpoints: everything that resumes a run, in `checkpoints/step_000200/`."""

import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from tinystories_slm.config import RunConfig, as_plain, load_config
from tinystories_slm.data.prepare import Manifest
from tinystories_slm.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""In a run folder: the manifest of the data that the run is trained on."""

# What may differ between the two halves of a run: where it is, how it is watched and cut into pieces.
_FREE_TO_CHANGE = {
    "output_dir",
    "data.data_dir",
    "data.num_workers",
    "train.resume",
    "train.log_every",
    "train.eval_every",
    "train.eval_stories",
    "train.save_every",
    "train.keep_checkpoints",
    "train.per_device_batch_size",
    "train.compile",
}


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    best_step: int = 0
    """The step of the model in best/."""
    best_loss: float = float("inf")
    """Its validation loss, in nats per token."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def save_checkpoint(accelerator: Accelerator, run_dir: Path, progress: Progress, *, keep: int) -> Path:
    """Write the checkpoint of `progress.step`, rename it into place, drop the oldest past `keep`."""
    folder = run_dir / "checkpoints" / f"step_{progress.step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    # It warns of every tied weight that it leaves out; loading ties them again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Accelerate has the same in a pickle; this copy is for people and for `newest_checkpoint`.
        (partial / "progress.json").write_text(json.dumps(progress.state_dict()), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    return folder


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    folders = [
        folder
        for folder in (run_dir / "checkpoints").glob("step_*")
        if re.fullmatch(r"step_\d+", folder.name) and (folder / "progress.json").is_file()
    ]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when it was written."""
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Restore model, optimizer, scheduler, random state and progress, on every process.

    Raises:
        InputError: the checkpoint holds weights of another shape, or is damaged.
    """
    try:
        accelerator.load_state(str(folder))
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
            f"output_dir ({run_dir}) has checkpoints but no config.yaml to say of what; choose another "
            "--output_dir, or start over with --train.resume never"
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
        InputError: with what differs.
    """
    then = Manifest.load(run_dir / MANIFEST)
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


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
