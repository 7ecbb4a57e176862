"""The four forms, and the way each is written: under another name first, checked, then put in place."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tinystories_slm.errors import InputError
from tinystories_slm.export.checks import Check
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, quiet, replace_folder

logger = logging.getLogger(__name__)

RECORD = "export.json"
"""In every export: its form, the versions it was made with, what was checked. No paths."""

Exporter = Callable[[TinyStoriesForCausalLM, PreTrainedTokenizerBase, Path], list[Check] | None]
"""Fills an empty folder, re-loads what it wrote, and returns what it compared or raises `ExportError`."""


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Write a trained model in a form that other tools load, and check that it computes the same."""

    model: str
    """Model folder (RUN/best) or Hub id of a model that was trained here."""
    format: Literal["custom", "native", "gguf", "onnx"]
    """`custom`: with this project's code; `native`: as transformers' own GPT-2, Llama or Qwen3; `gguf`:
    for llama.cpp; `onnx`: for onnxruntime and the browser."""
    output: Path
    """Folder to write; one that is there must be empty or an earlier export."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in `custom` and `native`."""
    quantization: Literal["f32", "f16", "q8_0"] = "f16"
    """Type of the weights in `gguf`."""
    vendor: bool = False
    """Put the libraries of the `onnx` form's page beside it, with npm, instead of having them loaded from
    jsdelivr.net."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    def __post_init__(self) -> None:
        if self.dtype != "float32" and self.format not in ("custom", "native"):
            raise InputError(
                f"dtype ({self.dtype}) is for custom and native, not {self.format}; leave it out"
            )
        if self.quantization != "f16" and self.format != "gguf":
            raise InputError(
                f"quantization ({self.quantization}) is for gguf, not {self.format}; leave it out"
            )
        if self.vendor and self.format != "onnx":
            raise InputError(f"vendor (True) is for onnx, not {self.format}; leave it out")


def export(args: ExportArgs) -> Path:
    """Write `args.output`, whole and checked, or leave everything as it was; prints what was done.

    Raises:
        InputError: nothing loadable, a model of another kind, a missing package, a folder that is no export.
        ExportError: what was written computes something else than the model.
    """
    _refuse_foreign(args.output)
    fill = _exporter(args)
    model, tokenizer = load_model_folder(args.model, revision=args.revision, device="cpu")
    if not isinstance(model, TinyStoriesForCausalLM):
        raise InputError(
            f"model {args.model!r} is a {type(model).__name__}, and exports are of models trained here; "
            "give RUN/best of a run"
        )
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir()
        with quiet(), _errors_only():
            checks = fill(model.to(getattr(torch, args.dtype)), tokenizer, partial) or []
        _write_record(args, checks, partial)
        replace_folder(partial, args.output)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"output ({args.output}) cannot be written ({error.strerror}); choose another --output"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(_summary(args.output, checks))
    return args.output


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without transformers' advice: here pad and end of text share an id on purpose."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def missing_extra(package: str) -> InputError:
    """What to raise where a form needs `package` and it is not installed."""
    return InputError(f"{package} is not installed; pip install 'tinystories_slm[export]'")


def _exporter(args: ExportArgs) -> Exporter:
    """Imported here, as each form needs packages that the others can do without."""
    if args.format == "gguf":
        _require("gguf")
        gguf = import_module("tinystories_slm.export.gguf")
        return lambda *whole: gguf.export_gguf(*whole, quantization=args.quantization)
    if args.format == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript", "transformers.exporters"):
            _require(package)
        onnx = import_module("tinystories_slm.export.onnx")
        return lambda *whole: onnx.export_onnx(*whole, vendor=args.vendor)
    module = import_module(f"tinystories_slm.export.{args.format}")
    return getattr(module, f"export_{args.format}")


def _require(package: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise missing_extra(package) from error


def _refuse_foreign(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / RECORD).is_file()):
        raise InputError(
            f"output ({output}) is there and is no export of this program; choose another --output"
        )


def _write_record(args: ExportArgs, checks: list[Check], folder: Path) -> None:
    record = {
        "format": args.format,
        **({"quantization": args.quantization} if args.format == "gguf" else {}),
        **({"dtype": args.dtype} if args.format in ("custom", "native") else {}),
        "packages": {name: version(name) for name in ("tinystories_slm", "torch", "transformers")},
        "checks": [asdict(check) for check in checks],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _summary(output: Path, checks: list[Check]) -> str:
    files = sorted(path for path in output.rglob("*") if path.is_file())
    lines = [f"{path.stat().st_size / 1e6:9.3f} MB  {path}" for path in files]
    lines += [f"checked   {check}" for check in checks]
    if checks:
        largest = max(check.max_difference for check in checks)
        lines.append(f"largest logits difference of all: {largest:.3g}")
    return "\n".join(lines)
