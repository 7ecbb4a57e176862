"""Save and load model folders: `from_pretrained` loads them with or without this package."""

import hashlib
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

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

from tinystories_slm.data.sources.hub import resolve_model_commit
from tinystories_slm.data.tokenizer import load_tokenizer, save_tokenizer
from tinystories_slm.errors import UserError
from tinystories_slm.gguf_file import GgufFacts, gguf_source, is_gguf_file, read_gguf_facts
from tinystories_slm.hardware.device import resolve_device
from tinystories_slm.int8_weights import round_to_int8
from tinystories_slm.io.atomic import file_sha256, replace_directory
from tinystories_slm.io.file_errors import check_regular_files, expand_user
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.text_boundaries import suppressed_token_ids

logger = logging.getLogger(__name__)

MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".jinja", ".py")
"""Suffixes of the files in a model folder that are read."""

# `save_pretrained` then copies the model code next to the weights and registers it in config.json.
TinyStoriesConfig.register_for_auto_class()
TinyStoriesForCausalLM.register_for_auto_class("AutoModelForCausalLM")


class ModelReference(NamedTuple):
    """A model folder, or a Hub id at a revision."""

    name: str
    """Path of the folder, or Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; None for its newest commit."""

    @property
    def is_local(self) -> bool:
        """Whether the name is a path."""
        return self.name.startswith((".", "/", "~")) or Path(self.name).exists()


def resolve_model(model: str, revision: str | None = None) -> ModelReference:
    """Return what `model`, or `model` and `revision`, name; every command resolves its models here.

    `USER/NAME@step512` is the Hub id `USER/NAME` at revision `step512`. `RUN@step512`, or `RUN` with the
    revision `step512`, is the folder `RUN/steps/step_000512` of a run directory.

    Raises:
        UserError: there are two revisions, or the run did not keep this step.
    """
    name, at, named = model.rpartition("@")
    if at and name and named and not expand_user(model).exists():
        if revision is not None:
            raise UserError(f"revision ({revision}): {model} names a revision, too; remove one of them")
        model, revision = name, named
    run = expand_user(model)
    if revision is None or not (run / "config.yaml").is_file():
        return ModelReference(model, revision)
    step = re.fullmatch(r"step_?(\d+)", revision)
    folder = step_folder(run, int(step[1])) if step else run / revision
    if not (folder / "config.json").is_file():
        kept = sorted(int(path.name.removeprefix("step_")) for path in (run / "steps").glob("step_*[0-9]"))
        found = ", ".join(f"step{number}" for number in kept) or "no steps (train with --train.keep log)"
        raise UserError(f"revision ({revision}): {model} has kept {found}; use one of them, best or last")
    return ModelReference(str(folder))


def step_folder(run: Path, step: int) -> Path:
    """Return the model folder of one optimizer step in the run directory `run`."""
    return run / "steps" / f"step_{step:06d}"


def save_model_folder(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """Write configuration, code, safetensors, tokenizer and generation defaults to `folder`.

    `folder` is replaced atomically: a reader sees the old or the new folder, never a mixture.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # `save_pretrained` registers only the class that it saves; vLLM and feature extraction load AutoModel.
    model.config.auto_map = {"AutoModel": "modeling_tinystories.TinyStoriesModel"}
    model.generation_config = default_generation_config(
        model,
        tokenizer,
        # Pipelines need the limit of learned positions; our class does not warn of it.
        max_length=model.generation_config.max_length,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    with no_progress_bars():
        model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    replace_directory(partial, folder)
    return folder


def default_generation_config(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> GenerationConfig:
    """Return the generation defaults of a saved model: sampling, up to the stop token, without padding.

    `max_new_tokens` is not set: the caller chooses the length. With a `max_length`, the classes of
    transformers warn at each call with `max_new_tokens`.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        max_length=max_length,
        suppress_tokens=suppressed_token_ids(model, tokenizer) or None,
        bos_token_id=tokenizer.eos_token_id,  # texts start with the end token in training
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def weights_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the weights in a model folder; it names them in every figure computed from them.

    That of a GGUF file or of model.safetensors, as `sha256sum` prints it; of several weight files, that of
    their `sha256sum` listing. None without weights.
    """
    if is_gguf_file(folder):
        return file_sha256(folder)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(files) < 2:
        return file_sha256(files[0]) if files else None
    listing = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def load_model_folder(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    requires_eos: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model and its tokenizer from a folder, a GGUF file or the Hub.

    From the Hub, configuration, code, weights and tokenizer come from one commit: the one that
    `revision` points to now. torch's restricted unpickler reads pickled weights (.bin) and runs none
    of their code.

    Args:
        model: Folder, GGUF file or Hub id, or one with a revision, as for `resolve_model`.
        revision: Branch, tag or commit of a Hub model (None for its newest commit), or a kept step of a run.
        trust_remote_code: Run the code in the folder or repository.
        device: Device of the model; None or `auto` for the best available one.
        dtype: Type of the weights; `int8` for float32 weights with the values of `round_to_int8`.
        requires_eos: Reject a tokenizer without an end-of-text token.

    Raises:
        UserError: the model cannot be loaded, it needs code that is not trusted, or the device is not
            available.
    """
    device = resolve_device(device)
    is_int8 = dtype in ("int8", torch.int8)
    dtype = torch.float32 if is_int8 else dtype
    reference = resolve_model(model, revision)
    with _pretrained_source(reference) as (name, options):
        network, loading = _read_model(
            reference.name, name, trust_remote_code=trust_remote_code, dtype=dtype, **options
        )
    _check_weights(reference.name, network, loading)
    if is_int8:
        round_to_int8(network)
    tokenizer = load_tokenizer(
        reference.name,
        revision=options.get("revision"),
        trust_remote_code=trust_remote_code,
        requires_eos=requires_eos,
    )
    return network.to(device).eval(), tokenizer


def _pretrained_source(reference: ModelReference) -> AbstractContextManager[tuple[str, dict[str, Any]]]:
    """Return a context with the name and the options that `from_pretrained` needs for the model."""
    model, revision = reference
    if is_gguf_file(path := expand_user(model)):
        _check_no_revision(model, revision)
        return gguf_source(path)
    if reference.is_local:
        return nullcontext((_local_folder(model, revision), {}))
    return nullcontext((model, _pinned_revision(model, revision)))


def _read_model(
    model: str, name: str, *, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and what `from_pretrained` states about its weights.

    Raises:
        UserError: it cannot be loaded, or it needs code that is not trusted.
    """
    try:
        file = options.get("gguf_file")
        facts = GgufFacts() if file is None else read_gguf_facts(Path(file))
        with no_progress_bars():
            network, loading = AutoModelForCausalLM.from_pretrained(
                name,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
                **facts.options,
            )
        if facts.training_data is not None:
            network.config.training_data = facts.training_data
        return network, loading
    except Exception as error:  # from transformers, the code of the model, or the reader of the file format
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise UserError(
                f"model {model!r} includes code that was not run; "
                "read it, then run it with --trust_remote_code"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model {model!r} cannot be loaded: {reason[:300]}") from error


def _local_folder(model: str, revision: str | None) -> str:
    """Return the path of a local model folder.

    Raises:
        UserError: it is not a model folder, or a revision is given.
    """
    path = expand_user(model)
    if not (path / "config.json").is_file():
        raise UserError(
            f"model {model!r} is not a model folder: it has no config.json; use RUN/best of a finished run, "
            "or RUN@step512"
        )
    check_regular_files(path, MODEL_SUFFIXES)
    _check_no_revision(model, revision)
    return str(path)


def _check_no_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise UserError(
            f"revision ({revision}) requires a Hub model, and model {model!r} is local; remove revision"
        )


def _check_weights(model: str, network: PreTrainedModel, loading: Mapping[str, Collection[str]]) -> None:
    """Check that the weights are those of the configuration; transformers fills what is missing at random.

    Raises:
        UserError: weights are missing, or left over in a model of ours; others may hold further parts.
    """
    is_own = network.config.model_type == TinyStoriesConfig.model_type
    for kind, names in (
        ("lacks", loading["missing_keys"]),
        ("has no place for", loading["unexpected_keys"] if is_own else ()),
    ):
        if names:
            raise UserError(
                f"model {model!r} cannot be loaded: it {kind} {len(names)} of its weights, such as "
                f"{min(names)}; restore config.json and the weights of one model"
            )


def _pinned_revision(model: str, revision: str | None) -> dict[str, Any]:
    """Return the arguments that load all parts of a Hub model at one commit.

    They select the cached files if the Hub cannot be reached.

    Raises:
        UserError: model or revision does not exist, or the Hub cannot be reached and the cache lacks it.
    """
    try:
        commit = resolve_model_commit(model, revision)
    except RevisionNotFoundError as error:
        raise UserError(
            f"revision ({revision}) is not a branch, tag or commit of model {model!r} on the Hub; correct it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"model {model!r} is neither a local folder nor a readable repository on the Hub; "
            "correct it, or log in with `hf auth login` if it is private"
        ) from error
    if commit:
        return {"revision": commit}
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise UserError(
            f"model {model!r} (revision {revision or 'main'}) is neither a local folder nor in the cache, "
            "and the Hub cannot be reached; correct the name or the connection"
        )
    return {"revision": revision or "main", "local_files_only": True}


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers in the block: they would interrupt ours."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
