"""A model folder: what `from_pretrained` loads, with or without this package."""

import logging
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tinystories_slm.data.tokenizer import load_tokenizer, save_tokenizer
from tinystories_slm.errors import InputError
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM

logger = logging.getLogger(__name__)

# `save_pretrained` then copies the model's code beside the weights and names it in config.json.
TinyStoriesConfig.register_for_auto_class()
TinyStoriesForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def save_model_folder(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """Write configuration, code, safetensors, tokenizer and generation defaults, replacing `folder` whole.

    Readers see the old folder or the new one, never a mixture.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # The saved class names itself; AutoModel, which vLLM and feature extraction ask for, has to be named.
    model.config.auto_map = {"AutoModel": "modeling_tinystories.TinyStoriesModel"}
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    with _quiet():
        model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    replace_folder(partial, folder)
    return folder


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, which may exist; on the disk, not in a cache, when it returns.

    Killed between its two renames it leaves no `folder`; `restore_folder` then finds the old one.
    """
    sync_folder(new)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was killed half-way."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the files in `folder`, and their names, are on the disk: a power cut loses none."""
    if os.name == "nt":
        return  # a directory cannot be opened there
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_model_folder(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal language model and its tokenizer, from a folder or the Hub, in float32 on `device`.

    Raises:
        InputError: nothing loadable there, or it brings code that was not trusted.
    """
    if model.startswith((".", "/", "~")) or Path(model).exists():
        path = Path(model).expanduser()
        if not (path / "config.json").is_file():
            raise InputError(
                f"model {model!r} is no model folder (no config.json); try RUN/best of a finished run"
            )
        model = str(path)
    try:
        with _quiet():
            network = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {model!r} cannot be loaded: {reason[:300]}") from error
    tokenizer = load_tokenizer(model, revision=revision)
    return network.to(device or best_device()).eval(), tokenizer


def best_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


class _quiet:
    """Without transformers' own progress bars, which would run through ours."""

    def __enter__(self) -> None:
        self.shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        if self.shown:
            transformers_logging.enable_progress_bar()
