"""The `export` command: write an export to a temporary folder, check it, then move it into place."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tinystories_slm.config.command_args import ExportArgs
from tinystories_slm.data.tokenizer import prepare_for_export
from tinystories_slm.errors import UserError
from tinystories_slm.export.checks import EquivalenceCheck
from tinystories_slm.io.atomic import replace_directory
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, no_progress_bars

EXPORT_MANIFEST = "export.json"
"""File in every export: its format, the package versions and the checks. It contains no paths."""

Exporter = Callable[[TinyStoriesForCausalLM, PreTrainedTokenizerBase, Path], list[EquivalenceCheck] | None]
"""Writes into an empty folder, loads the files again, and returns its checks or raises `ExportError`."""


def export(args: ExportArgs) -> Path:
    """Write a complete, checked export to `args.output`; on an error leave everything as it was.

    Prints the files with their sizes, and the checks.

    Raises:
        UserError: the model cannot be loaded or was not trained here, a package is missing, or the output
            is not an export.
        ExportError: the export does not compute what the model computes.
    """
    _check_output_folder(args.output)
    write_export = _load_exporter(args)
    model, tokenizer = load_model_folder(args.model, revision=args.revision, device="cpu")
    if not isinstance(model, TinyStoriesForCausalLM):
        raise UserError(
            f"model ({args.model}) is a {type(model).__name__}, but only models trained here can be "
            "exported; use RUN/best of a run"
        )
    prepare_for_export(tokenizer)
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
        with no_progress_bars(), _transformers_errors_only():
            checks = write_export(model.to(getattr(torch, args.dtype)), tokenizer, partial) or []
        _write_manifest(args, checks, partial)
        replace_directory(partial, args.output)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"output ({args.output}) cannot be written ({error.strerror}); choose another --output"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(_format_summary(args.output, checks))
    return args.output


@contextmanager
def _transformers_errors_only() -> Iterator[None]:
    """Suppress the warnings of transformers: here pad and end token share an id on purpose."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def missing_extra_error(package: str) -> UserError:
    """Return the error for a format that needs `package`, which is not installed."""
    return UserError(f"{package} is not installed; pip install 'tinystories_slm[export]'")


def _load_exporter(args: ExportArgs) -> Exporter:
    """Import the exporter of `args.format`; each format needs packages that the others do not need."""
    if args.format == "gguf":
        _require("gguf")
        gguf = import_module("tinystories_slm.export.gguf")
        return lambda *model_and_folder: gguf.export_gguf(*model_and_folder, quantization=args.quantization)
    if args.format == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript", "transformers.exporters"):
            _require(package)
        onnx = import_module("tinystories_slm.export.onnx")
        return lambda *model_and_folder: onnx.export_onnx(*model_and_folder, vendor=args.vendor)
    module = import_module(f"tinystories_slm.export.{args.format}")
    return getattr(module, f"export_{args.format}")


def _require(package: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise missing_extra_error(package) from error


def _check_output_folder(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / EXPORT_MANIFEST).is_file()):
        raise UserError(f"output ({output}) exists and is not an earlier export; choose another --output")


def _write_manifest(args: ExportArgs, checks: list[EquivalenceCheck], folder: Path) -> None:
    manifest = {
        "format": args.format,
        **({"quantization": args.quantization} if args.format == "gguf" else {}),
        **({"dtype": args.dtype} if args.format in ("custom", "native") else {}),
        "packages": {name: version(name) for name in ("tinystories_slm", "torch", "transformers")},
        "checks": [asdict(check) for check in checks],
    }
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _format_summary(output: Path, checks: list[EquivalenceCheck]) -> str:
    files = sorted(path for path in output.rglob("*") if path.is_file())
    lines = [f"{path.stat().st_size / 1e6:9.3f} MB  {path}" for path in files]
    lines += [f"checked   {check}" for check in checks]
    if checks:
        largest = max(check.max_difference for check in checks)
        lines.append(f"largest logits difference of all checks: {largest:.3g}")
    return "\n".join(lines)
