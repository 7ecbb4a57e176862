"""Checks of resources: memory, disk, data and a writable run directory."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from tinystories_slm.config import RunConfig
from tinystories_slm.config.sections import RESUME_MODES
from tinystories_slm.data.prepare import ensure_prepared, token_file_differences
from tinystories_slm.data.raw_stories import STREAMING_SAMPLE
from tinystories_slm.data.source_stories import open_stories
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.doctor.diagnostic import Diagnostic
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.peak import peak_flops
from tinystories_slm.io.units import format_bytes
from tinystories_slm.model import TinyStoriesConfig
from tinystories_slm.model_costs import disk_bytes, flops_per_token
from tinystories_slm.training.checkpoints import check_same_run, checkpoints
from tinystories_slm.training.extension import find_extension
from tinystories_slm.training.optimizers import optimizer_spec
from tinystories_slm.training.retention import KeptCounts, count_kept, format_kept, max_reachable_steps
from tinystories_slm.training.runtime import estimate_memory, resolve_per_device_batch_size
from tinystories_slm.training.schedule import has_constant_part

# Interpreter and libraries, without tensors; measured with everything imported.
_INTERPRETER_BYTES = 700e6
# The estimate is correct within a third (tests/test_model_costs.py).
_MEMORY_MARGIN = 1.33
_GPT2_VOCAB_SIZE = 50_257
# Disk bytes per downloaded byte: the Hub's cache of the dataset, raw stories and token files.
_DOWNLOAD_FACTOR = 3


def load_manifest(config: RunConfig) -> Manifest | None:
    """Return the manifest of the data folder; None if the data are not prepared."""
    path = config.data.data_dir / "manifest.json"
    return Manifest.load(path) if path.exists() else None


def vocab_size(config: RunConfig) -> int:
    """Return the vocabulary size of the prepared data, else the configured one.

    A pretrained tokenizer is not downloaded; it counts as GPT-2's, with 50,257 entries.
    """
    if manifest := load_manifest(config):
        return manifest.vocab_size
    return config.tokenizer.vocab_size if config.tokenizer.pretrained is None else _GPT2_VOCAB_SIZE


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that a run could allocate on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # MPS shares the main memory


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk that holds `folder`, or will hold it."""
    return shutil.disk_usage(_nearest_existing(folder)).free


def check_memory(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Diagnostic]:
    """Compare the estimated peak memory of training on one device with its free memory."""
    free = free_memory(device)
    per_device = resolve_per_device_batch_size(config, device, precision=run_precision)
    needed = needed_memory(config, device, run_precision, per_device)
    text = (
        f"a process needs about {format_bytes(needed)} at train.per_device_batch_size {per_device}, "
        f"{format_bytes(free)} free"
    )
    if needed <= free:
        yield Diagnostic("memory", "ok", text)
        return
    fitting = [
        rows
        for rows in range(1, per_device)
        if config.train.batch_size % rows == 0 and needed_memory(config, device, run_precision, rows) <= free
    ]
    if fitting:
        remedy = f"--train.per_device_batch_size {max(fitting)} (same results, more micro-batches)"
    else:
        remedy = "stop other programs, or use a smaller preset or --data.seq_len"
    yield Diagnostic("memory", "PROBLEM", text, remedy)


def needed_memory(config: RunConfig, device: torch.device, run_precision: str, rows: int) -> float:
    """Return the bytes that a process needs at most, with a micro-batch of `rows`; with Python and torch."""
    estimate = estimate_memory(
        config, device, precision=run_precision, rows=rows, vocab_size=vocab_size(config)
    )
    return _MEMORY_MARGIN * estimate.total + _INTERPRETER_BYTES


def check_disk(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Diagnostic]:
    """Compare the largest size of the run directory with the free disk space."""
    model, train = config.model_config(vocab_size=vocab_size(config)), config.train
    state = {
        "optimizer_bytes": optimizer_spec(train.optimizer).state_bytes(model),
        "averaged": train.ema_decay is not None,
    }
    max_steps = _max_steps(config, model, device, run_precision)
    kept = count_kept(train, max_steps)
    num_checkpoints = kept.checkpoints + has_constant_part(train)
    needed = disk_bytes(model, num_checkpoints=num_checkpoints, num_models=kept.models, **state)
    free = free_disk(config.output_dir)
    text = (
        f"{config.output_dir} needs about {format_bytes(needed.run_folder)} "
        f"({format_kept(kept, needed, max_steps)}), {format_bytes(free)} free"
    )
    if needed.run_folder <= free:
        yield Diagnostic("disk", "ok", text)
        return
    remedy = "free some space, or --output_dir on another disk"
    fewer = disk_bytes(model, num_checkpoints=1, **state).run_folder
    if kept != KeptCounts(1, 0) and fewer <= free:
        remedy += ", or --train.keep newest:1"
    yield Diagnostic("disk", "PROBLEM", text, remedy)


def _max_steps(config: RunConfig, model: TinyStoriesConfig, device: torch.device, run_precision: str) -> int:
    """Return the number of steps of a run on one process; with a time limit, at peak FLOP/s."""
    train = config.train
    if train.max_minutes is None:
        return train.max_steps
    return max_reachable_steps(
        train,
        step_flops=train.batch_size * config.data.seq_len * flops_per_token(model, config.data.seq_len),
        flops_per_second=peak_flops(device, run_precision).flops_per_second,
    )


def check_run_dir(config: RunConfig) -> Iterator[Diagnostic]:
    """Check that the run directory is writable and which checkpoint a run would resume from."""
    run_dir = config.output_dir
    existing = _nearest_existing(run_dir)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Diagnostic(
            "run directory", "PROBLEM", f"{run_dir} is not writable", "choose another --output_dir"
        )
        return
    found, resume = checkpoints(run_dir), config.train.resume
    if extension := find_extension(config):
        text = f"{run_dir}: a run would be extended from {extension.checkpoint.name}"
        yield Diagnostic("run directory", "ok", text)
    elif resume not in RESUME_MODES:
        yield Diagnostic("run directory", "ok", f"{run_dir}: a run would start from checkpoint {resume}")
    elif not found or resume == "never":
        yield Diagnostic("run directory", "ok", f"{run_dir}: a run would start at step 1")
    else:
        check_same_run(config, run_dir)
        yield Diagnostic("run directory", "ok", f"{run_dir}: a run would resume from {found[-1].name}")


def check_data(config: RunConfig) -> Iterator[Diagnostic]:
    """Check that the token files exist or can be created."""
    folder, source = config.data.data_dir, find_source(config.data.source, config.data.subset)
    differences = token_file_differences(config.data, config.tokenizer)
    if differences:
        text = f"{folder}: will be built again, as {'; '.join(differences)}"
        yield Diagnostic("data", "note", text, "set another --data.data_dir to keep what is there")
    if differences == []:
        manifest = ensure_prepared(config.data, config.tokenizer)
        tokens = manifest.splits["train"]["num_tokens"]
        stories = f"a sample of {source.value}" if config.data.streaming else source.value
        yield Diagnostic("data", "ok", f"{folder}: {tokens:,} training tokens of {stories} are prepared")
    elif source.needs_network:
        yield _check_download(config)
    else:
        open_stories(source.value, subset=source.subset)  # raises if the source does not exist
        yield Diagnostic("data", "ok", f"{folder}: will be created from {source.label or source.value}")
    pretrained = config.tokenizer.pretrained
    if pretrained and not (folder / "tokenizer").exists() and not Path(pretrained).exists():
        yield Diagnostic("tokenizer", "note", f"{pretrained} will be loaded from the Hub or its cache")


def _check_download(config: RunConfig) -> Diagnostic:
    """Check that a dataset is downloaded, or is reachable and fits on the disk."""
    source, folder = config.data.source, config.data.data_dir
    if (folder / "raw" / "source.json").exists():
        return Diagnostic("data", "ok", f"{folder}: the stories of {source} are downloaded")
    splits = ("train",) if config.data.validation_split == "holdout" else ("train", "validation")
    try:
        size = find_source(source, config.data.subset).num_download_bytes(config.data.revision, splits)
    except UserError as error:
        builtin = "--data.source builtin --data.data_dir data/builtin"
        return Diagnostic("data", "PROBLEM", str(error), f"or train on the built-in corpus: {builtin}")
    if config.data.streaming:
        text = (
            f"{source} will be read over the network ({format_bytes(size)} an epoch); of each split, at most "
        )
        return Diagnostic("data", "ok", f"{text}{STREAMING_SAMPLE:,} stories are stored")
    needed, free = _DOWNLOAD_FACTOR * size, free_disk(folder)
    text = (
        f"{source} will be downloaded ({format_bytes(size)}); it needs about {format_bytes(needed)} of disk, "
        f"{format_bytes(free)} free"
    )
    if needed > free:
        return Diagnostic("data", "PROBLEM", text, "free some space, or --data.data_dir on another disk")
    return Diagnostic("data", "ok", text)


def _nearest_existing(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())
