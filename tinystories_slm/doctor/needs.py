"""What the configuration needs, against what is there: memory, disk, data, a folder to write to."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from tinystories_slm.config import RunConfig
from tinystories_slm.data.hub import TIMEOUT_S
from tinystories_slm.data.origin import BUILTIN
from tinystories_slm.data.prepare import Manifest, prepared
from tinystories_slm.data.sources import is_on_hub
from tinystories_slm.doctor.finding import Finding, first_line
from tinystories_slm.training.checkpoints import check_same_run, checkpoints
from tinystories_slm.training.settings import expected_memory, resolve_per_device_batch_size
from tinystories_slm.training.watching.estimate import disk_bytes

# Of the interpreter and its libraries, beside tensors; measured with everything imported.
_PROCESS_BYTES = 700e6
# The estimate is right within a third (tests/training/watching/test_estimate.py).
_MARGIN = 1.33
_GPT2_VOCAB_SIZE = 50_257
# Raw stories, token files and the Hub's cache of the dataset, for each byte of its download.
_HUB_COPIES = 3


def manifest_of(config: RunConfig) -> Manifest | None:
    """The manifest of the data folder, if the data are prepared."""
    path = config.data.data_dir / "manifest.json"
    return Manifest.load(path) if path.exists() else None


def vocab_size(config: RunConfig) -> int:
    """Of the prepared data; else as configured; an existing tokenizer not at hand counts as GPT-2's."""
    if manifest := manifest_of(config):
        return manifest.vocab_size
    return config.tokenizer.vocab_size if config.tokenizer.pretrained is None else _GPT2_VOCAB_SIZE


def free_memory(device: torch.device) -> int:
    """Bytes that a training could take on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # Apple's GPUs share it


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def memory(config: RunConfig, device: torch.device, run_precision: str) -> Iterator[Finding]:
    """The estimated peak of training on one device against the memory that is free there."""
    free = free_memory(device)
    per_device = resolve_per_device_batch_size(config, device, precision=run_precision)
    needed = _needed_memory(config, device, run_precision, per_device)
    said = (
        f"about {gb(needed)} needed by a process at train.per_device_batch_size {per_device}, {gb(free)} free"
    )
    if needed <= free:
        yield Finding("memory", "ok", said)
        return
    fitting = [
        rows
        for rows in range(1, per_device)
        if config.train.batch_size % rows == 0 and _needed_memory(config, device, run_precision, rows) <= free
    ]
    if fitting:
        remedy = f"--train.per_device_batch_size {max(fitting)} (the same run, in more micro-batches)"
    else:
        remedy = "end other programs, or choose a smaller preset or --data.seq_len"
    yield Finding("memory", "PROBLEM", said, remedy)


def _needed_memory(config: RunConfig, device: torch.device, run_precision: str, rows: int) -> float:
    estimate = expected_memory(
        config, device, precision=run_precision, rows=rows, vocab_size=vocab_size(config)
    )
    return _MARGIN * estimate.total + _PROCESS_BYTES


def disk(config: RunConfig) -> Iterator[Finding]:
    """The run folder at its largest against what is free there."""
    model, train = config.model_config(vocab_size=vocab_size(config)), config.train
    how = {"optimizer": train.optimizer, "averaged": train.ema_decay is not None}
    needed = disk_bytes(model, keep_checkpoints=train.keep_checkpoints, **how)
    free = free_disk(config.output_dir)
    said = (
        f"{config.output_dir} needs about {gb(needed.run_folder)} ({gb(needed.checkpoint)} a checkpoint), "
        f"{gb(free)} free"
    )
    if needed.run_folder <= free:
        yield Finding("disk", "ok", said)
        return
    remedy = "make room, or --output_dir on another disk"
    fewer = disk_bytes(model, keep_checkpoints=1, **how).run_folder
    if train.keep_checkpoints > 1 and fewer <= free:
        remedy += ", or --train.keep_checkpoints 1"
    yield Finding("disk", "PROBLEM", said, remedy)


def gb(num_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def run_folder(config: RunConfig) -> Iterator[Finding]:
    """Whether the run can write where it is to, and what is there already."""
    folder = config.output_dir
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield Finding(
            "run folder", "PROBLEM", f"{folder} cannot be written to", "choose another --output_dir"
        )
        return
    found, resume = checkpoints(folder), config.train.resume
    if resume not in ("auto", "never"):
        yield Finding("run folder", "ok", f"{folder}: a run would branch off from {resume}")
    elif not found or resume == "never":
        yield Finding("run folder", "ok", f"{folder}: a run would begin at step 1")
    else:
        check_same_run(config, folder)
        yield Finding("run folder", "ok", f"{folder}: a run would go on from {found[-1].name}")


def data(config: RunConfig) -> Iterator[Finding]:
    """Whether the token files are there, or can be made."""
    source, folder = config.data.source, config.data.data_dir
    if (folder / "manifest.json").exists():
        manifest = prepared(config.data, config.tokenizer)
        tokens = manifest.splits["train"]["num_tokens"]
        yield Finding("data", "ok", f"{folder}: {tokens:,} training tokens of {source}, prepared")
    elif source == BUILTIN:
        yield Finding("data", "ok", f"{folder}: will be made from the built-in corpus")
    elif not is_on_hub(source):
        yield Finding("data", "ok", f"{folder}: will be made from {source}")
    else:
        yield hub_data(config)
    pretrained = config.tokenizer.pretrained
    if pretrained and not (folder / "tokenizer").exists() and not Path(pretrained).exists():
        yield Finding("tokenizer", "note", f"{pretrained} has to come from the Hub or its cache")


def hub_data(config: RunConfig) -> Finding:
    """Whether a dataset that has to be fetched can be, and whether it fits on the disk."""
    source, folder = config.data.source, config.data.data_dir
    if (folder / "raw" / "source.json").exists():
        return Finding("data", "ok", f"{folder}: the stories of {source} are downloaded")
    try:
        info = HfApi().dataset_info(
            source, revision=config.data.revision, timeout=TIMEOUT_S, files_metadata=True
        )
    except RepositoryNotFoundError:
        return Finding("data", "PROBLEM", f"the Hub has no dataset {source}", "correct --data.source")
    except Exception as error:  # offline, a proxy, a gate: whatever the HTTP library of the day raises
        return Finding(
            "data",
            "PROBLEM",
            f"{source} is not downloaded, and the Hub cannot be asked for it ({first_line(error)})",
            "connect, or train on the built-in corpus: --data.source builtin --data.data_dir data/builtin",
        )
    size = sum(file.size or 0 for file in info.siblings or [])
    needed, free = _HUB_COPIES * size, free_disk(folder)
    said = f"{source} is on the Hub ({gb(size)}); about {gb(needed)} of disk, {gb(free)} free"
    if needed > free:
        return Finding("data", "PROBLEM", said, "make room, or --data.data_dir on another disk")
    return Finding("data", "ok", said)
