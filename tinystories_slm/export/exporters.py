"""The `export` command: write an export to a temporary folder, check it, then move it into place."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tinystories_slm.config.command_args import ExportArgs
from tinystories_slm.errors import UserError
from tinystories_slm.export.checks import EquivalenceCheck
from tinystories_slm.io.atomic import replace_directory
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, no_progress_bars

EXPORT_MANIFEST = "export.json"
"""File in every export: its format, the package versions and the checks. It contains no paths."""


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format of `export --format`: how it is written, and its facts."""

    write: Callable[
        [TinyStoriesForCausalLM, PreTrainedTokenizerBase, Path, ExportArgs], list[EquivalenceCheck]
    ]
    """Write the model into an empty folder, load the files again and return the checks; `ExportError` if the
    export does not compute what the model computes."""
    packages: tuple[str, ...] = ()
    """Packages that this format needs and the others do not."""
    recorded: tuple[str, ...] = ()
    """Options of `ExportArgs` that export.json records."""


def export(args: ExportArgs) -> Path:
    """Write a complete, checked export to `args.output`; on an error leave everything as it was.

    Prints the files with their sizes, and the checks.

    Raises:
        UserError: the model cannot be loaded or was not trained here, a package is missing, or the output
            is not an export.
        ExportError: the export does not compute what the model computes.
    """
    _check_output_folder(args.output)
    export_format = _find_format(args.format)
    model, tokenizer = load_model_folder(args.model, revision=args.revision, device="cpu")
    if not isinstance(model, TinyStoriesForCausalLM):
        raise UserError(
            f"model ({args.model}) is a {type(model).__name__}, but only models trained here can be "
            "exported; use RUN/best of a run"
        )
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
        with no_progress_bars(), _transformers_errors_only():
            checks = export_format.write(model.to(getattr(torch, args.dtype)), tokenizer, partial, args)
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


def _find_format(name: str) -> ExportFormat:
    if name not in EXPORT_FORMATS:
        raise UserError(f"format ({name}): must be one of {', '.join(EXPORT_FORMATS)}")
    for package in EXPORT_FORMATS[name].packages:
        _require(package)
    return EXPORT_FORMATS[name]


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
        **{name: getattr(args, name) for name in EXPORT_FORMATS[args.format].recorded},
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


# Each format imports its module when it is used: the modules need packages that the others do not need.


def _write_custom(model, tokenizer, folder: Path, args: ExportArgs) -> list[EquivalenceCheck]:
    from tinystories_slm.export.custom import export_custom

    return export_custom(model, tokenizer, folder)


def _write_native(model, tokenizer, folder: Path, args: ExportArgs) -> list[EquivalenceCheck]:
    from tinystories_slm.export.native import export_native

    return export_native(model, tokenizer, folder)


def _write_gguf(model, tokenizer, folder: Path, args: ExportArgs) -> list[EquivalenceCheck]:
    from tinystories_slm.export.gguf import export_gguf

    return export_gguf(model, tokenizer, folder, quantization=args.quantization)


def _write_onnx(model, tokenizer, folder: Path, args: ExportArgs) -> list[EquivalenceCheck]:
    from tinystories_slm.export.onnx import export_onnx

    return export_onnx(model, tokenizer, folder, vendor=args.vendor)


EXPORT_FORMATS: dict[str, ExportFormat] = {
    "custom": ExportFormat(write=_write_custom, recorded=("dtype",)),
    "native": ExportFormat(write=_write_native, recorded=("dtype",)),
    "gguf": ExportFormat(write=_write_gguf, packages=("gguf",), recorded=("quantization",)),
    "onnx": ExportFormat(
        write=_write_onnx, packages=("onnx", "onnxruntime", "onnxscript", "transformers.exporters")
    ),
}
"""Formats by the name in `export --format`; docs/extending.md adds one."""
