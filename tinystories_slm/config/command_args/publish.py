"""Options of the export and push commands."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Export a trained model to a format of other tools, and check that it computes the same."""

    model: str
    """Model folder (RUN/best) or Hub id of a model that was trained here."""
    format: Literal["custom", "native", "gguf", "llama2c", "onnx"]
    """`custom`: with this project's model code; `native`: as the GPT-2, Llama or Qwen3 class of transformers;
    `gguf`: for llama.cpp; `llama2c`: for `run` of llama2.c; `onnx`: for onnxruntime and the browser."""
    output: Path
    """Folder to write; an existing one must be empty or an earlier export, whose files are replaced; all
    other files stay."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in `custom` and `native`."""
    quantization: Literal["f32", "f16", "q8_0"] = "f16"
    """Type of the weights in `gguf`."""
    vendor: bool = False
    """Copy the JavaScript libraries of the `onnx` page into the export with npm; without it the page loads
    them from jsdelivr.net."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""

    def __post_init__(self) -> None:
        expand_home(self)
        if self.dtype != "float32" and self.format not in ("custom", "native"):
            raise UserError(f"dtype ({self.dtype}) applies to custom and native, not {self.format}; omit it")
        if self.quantization != "f16" and self.format != "gguf":
            raise UserError(f"quantization ({self.quantization}) applies to gguf, not {self.format}; omit it")
        if self.vendor and self.format != "onnx":
            raise UserError(f"vendor (True) applies to onnx, not {self.format}; omit it")


@dataclass(frozen=True, kw_only=True)
class PushArgs:
    """Publish a run on the Hugging Face Hub as one commit, with the token of `hf auth login` or HF_TOKEN."""

    run: Path | None = None
    """Run directory; its best/ holds the model. Required, except with `code_only`."""
    repo_id: str
    """USER/NAME of the repository, which is created if it does not exist."""
    private: bool = False
    """Create the repository as private; an existing public repository is an error."""
    format: str = "custom,native"
    """`custom`: with this project's code; `native`: as a class of transformers; with both, `native` is in
    the folder native/."""
    revision: str | None = None
    """Tag for the commit (`v1`); an existing tag is never moved."""
    license: str | None = None
    """License of the model, by its identifier on the Hub (`mit`); null for none."""
    all_steps: bool = False
    """Also push each model in RUN/steps as a branch: `step512` of the optimizer step 512."""
    code_only: bool = False
    """Update only the model's code files in an existing repository, in one commit; weights, card and
    records stay. Use it if the published code is older than the installed transformers of its users."""
    dry_run: bool = False
    """List every file with its size and stop, without a request to the Hub."""

    def __post_init__(self) -> None:
        expand_home(self)
        check_repo_id("repo_id", self.repo_id)
        unknown = [name for name in self.formats if name not in ("custom", "native")]
        if unknown or not self.formats:
            raise UserError(f"format ({self.format}) must be custom, native or custom,native")
        if self.run is None and not self.code_only:
            raise UserError("run is missing; use --run RUN with a run directory")
        if self.code_only:
            for name in ("run", "private", "format", "license", "all_steps"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UserError(
                        f"{name} ({getattr(self, name)}) has no effect with code_only; remove one of them"
                    )
        if self.revision is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.revision):
            raise UserError(f"revision ({self.revision}) is not a valid tag; use one such as v1")

    @property
    def formats(self) -> list[str]:
        return [name.strip() for name in self.format.split(",") if name.strip()]


def check_repo_id(option: str, value: str) -> None:
    """Check the id of a repository on the Hub.

    Raises:
        UserError: it has no owner, or a character that the Hub does not allow.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{option} ({value}) is not valid: {reason}") from error
    if "/" not in value:
        raise UserError(f"{option} ({value}) must include the owner; use USER/{value}")
