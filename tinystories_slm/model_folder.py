"""A model folder: what `from_pretrained` loads, with or without this package."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tinystories_slm.data.hub import model_commit
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
    model.generation_config = generation_defaults(model, tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with quiet():
        model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    replace_folder(partial, folder)
    return folder


def generation_defaults(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """How stories are told where nothing else is asked for: sampled, up to the end token.

    No `max_new_tokens`: how long a story may get is the caller's to say.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        max_length=model.generation_config.max_length,  # learned positions end; a pipeline has to know where
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


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
    dtype: str | torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal language model and its tokenizer, from a folder or the Hub, on `device` (null or `auto`:
    the best there is).

    From the Hub, configuration, code, weights and tokenizer are all of the one commit that `revision` is now.
    Pickled weights (.bin) are read by torch's restricted unpickler, which runs none of their code.

    Raises:
        InputError: nothing loadable there, it brings code that was not trusted, or there is no such device.
    """
    device = find_device(device)
    if model.startswith((".", "/", "~")) or Path(model).exists():
        path = Path(model).expanduser()
        if not (path / "config.json").is_file():
            raise InputError(
                f"model {model!r} is no model folder (no config.json); try RUN/best of a finished run"
            )
        if revision is not None:
            raise InputError(
                f"the revision {revision!r} is asked for, and model {model!r} is a folder, which has none; "
                "drop it"
            )
        model, at = str(path), {}
    else:
        at = _at_commit(model, revision)
    try:
        with quiet():
            network = AutoModelForCausalLM.from_pretrained(
                model, trust_remote_code=trust_remote_code, dtype=dtype, **at
            )
    except Exception as error:  # what transformers, the model's own code or the format of the day raise
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise InputError(
                f"model {model!r} brings code of its own, which was not run; "
                "read it, then run it with --trust_remote_code"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"model {model!r} cannot be loaded: {reason[:300]}") from error
    tokenizer = load_tokenizer(model, revision=at.get("revision"), trust_remote_code=trust_remote_code)
    return network.to(device).eval(), tokenizer


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; null or `auto` for CUDA, else Apple's MPS, else the CPU.

    Raises:
        InputError: this machine, or this build of torch, has none.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None or name == "auto":
        return torch.device(next(kind for kind, found in there.items() if found))
    device = torch.device(name)
    if not there.get(device.type, True):
        raise InputError(
            f"device ({name}) is not there: torch {torch.__version__} finds none; take auto or cpu"
        )
    return device


def _at_commit(model: str, revision: str | None) -> dict[str, Any]:
    """How to load all parts of a Hub model at one commit; from the cache where the Hub is out of reach."""
    try:
        commit = model_commit(model, revision)
    except RevisionNotFoundError as error:
        raise InputError(
            f"the revision {revision!r} is no branch, tag or commit of model {model!r} on the Hub; correct it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"model {model!r} is neither a folder here nor a repository on the Hub that you may read; "
            "correct it, or log in with `hf auth login` if it is private"
        ) from error
    if commit:
        return {"revision": commit}
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise InputError(
            f"model {model!r} (revision {revision or 'main'}) is no folder here and not in the cache, and "
            "the Hub could not be asked for it; correct the name or the connection"
        )
    return {"revision": revision or "main", "local_files_only": True}


class quiet:
    """Without transformers' own progress bars, which would run through ours."""

    def __enter__(self) -> None:
        self.shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        if self.shown:
            transformers_logging.enable_progress_bar()
