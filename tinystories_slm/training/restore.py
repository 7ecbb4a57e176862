"""Make model folders of a run that were deleted, best/ and last/, again from its checkpoints."""

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_model

from tinystories_slm.config import RunConfig
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.training_data import TrainingData
from tinystories_slm.hardware.launch_env import process_rank
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.runs.run_dir import RunDir, read_json_object
from tinystories_slm.training.checkpoints import (
    checkpoint_step,
    checkpoints,
    latest_valid_checkpoint,
    read_progress,
    verify_checkpoint,
)
from tinystories_slm.training.ema import EMA_FILE
from tinystories_slm.training.sharded_checkpoints import is_sharded_checkpoint, read_sharded_model

logger = logging.getLogger(__name__)

_WEIGHTS_FILE = "model.safetensors"  # as Accelerate names it


def restore_finished_run(config: RunConfig) -> None:
    """Make best/ and last/ of a finished run again if they are missing; on the main process.

    Raises:
        UserError: best/ is missing, and no checkpoint of its step is left.
    """
    run_dir = RunDir(config.output_dir)
    if process_rank() != 0 or (run_dir.best.is_dir() and run_dir.last.is_dir()):
        return
    newest = latest_valid_checkpoint(config.output_dir)
    best_step = read_progress(newest).best_step
    for folder, step in ((run_dir.last, checkpoint_step(newest)), (run_dir.best, best_step)):
        if not folder.is_dir() and not restore_model_folder(config, folder, step):
            other = run_dir.last if folder == run_dir.best else run_dir.best
            raise UserError(
                f"{folder} is missing, and no checkpoint of its step {step} can replace it; copy {other} to "
                "use that model, or train again with --train.resume never"
            )


def restore_model_folder(config: RunConfig, folder: Path, step: int) -> bool:
    """Write the model folder `folder` from the checkpoint of `step`; return whether one could be used."""
    run_dir = RunDir(config.output_dir)
    found = [path for path in checkpoints(run_dir.path) if checkpoint_step(path) == step]
    tokenizer_folder = _find_tokenizer(config, run_dir)
    manifest = run_dir.load_manifest()
    if not found or tokenizer_folder is None or manifest is None or verify_checkpoint(found[0]):
        return False
    averaged = config.train.ema_decay is not None
    weights = found[0] / (EMA_FILE if averaged else _WEIGHTS_FILE)
    if not (weights.is_file() or is_sharded_checkpoint(found[0])):  # sharded by FSDP, in an earlier version
        return False
    tokenizer = load_tokenizer(str(tokenizer_folder))
    model_config = config.model_config(
        vocab_size=manifest.vocab_size,
        eos_token_id=manifest.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model_config.training_data, model_config.training_step = training_data_record(manifest, run_dir), step
    if averaged:
        model_config.ema_decay = config.train.ema_decay
    model = TinyStoriesForCausalLM(model_config)
    if weights.is_file():
        load_model(model, str(weights))
    else:
        read_sharded_model(model, found[0], averaged=averaged)
    save_model_folder(model, tokenizer, folder)
    logger.warning("%s was missing; written again from %s", folder, found[0])
    return True


def training_data_record(manifest: Manifest, earlier_run: RunDir | None = None) -> list[dict[str, Any]]:
    """Return the record of the training data for config.json.

    A resumed run keeps the record in its model folders, which includes the data of the model that it started
    from.
    """
    for folder in (earlier_run.last, earlier_run.best) if earlier_run else ():
        saved = read_json_object(folder / "config.json")
        if "training_data" in saved:
            return saved["training_data"]
    return [data.to_dict() for data in TrainingData.of_run(manifest.provenance)]


def _find_tokenizer(config: RunConfig, run_dir: RunDir) -> Path | None:
    """Return a folder with the tokenizer of the run: another model folder, or the data directory."""
    for folder in (run_dir.best, run_dir.last):
        if folder.is_dir():
            return folder
    data, manifest = config.data.data_dir / "manifest.json", run_dir.load_manifest()
    if manifest is None or not data.is_file():
        return None
    same = Manifest.load(data).tokenizer_sha256 == manifest.tokenizer_sha256
    return config.data.data_dir / "tokenizer" if same else None
