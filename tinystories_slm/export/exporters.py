"""The `export` command: write an export to a temporary folder, check it, then move it into place."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tinystories_slm.config.command_args.publish import ExportArgs
from tinystories_slm.data.tokenizer import prepare_for_export
from tinystories_slm.errors import UserError
from tinystories_slm.export.checks import EquivalenceCheck
from tinystories_slm.io.atomic import (
    complete_directory,
    fsync_directory,
    remove_directory,
    replace_directory,
    write_text,
)
from tinystories_slm.io.file_errors import translate_write_errors
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, no_progress_bars

EXPORT_MANIFEST = "export.json"
"""File in every export: its format, the package versions, the checks, and the names of all its files."""
_PARTIAL = ".export.partial"


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

    In an existing folder, only the files of an earlier export are replaced; all others stay.

    Prints the files with their sizes, and the checks.

    Raises:
        UserError: the model cannot be loaded or was not trained here, a package is missing, or the output
            is not an export.
        ExportError: the export does not compute what the model computes.
    """
    output = Path(os.path.abspath(args.output))  # `.` has no name
    with translate_write_errors("output", args.output):
        earlier = _earlier_files(args, output)
    export_format = _find_format(args.format)
    model, tokenizer = load_model_folder(args.model, revision=args.revision, device="cpu")
    if not isinstance(model, TinyStoriesForCausalLM):
        raise UserError(
            f"model ({args.model}) is a {type(model).__name__}, but only models trained here can be "
            "exported; use RUN/best of a run"
        )
    prepare_for_export(tokenizer)
    with translate_write_errors("output", args.output), _temporary_folder(output) as partial:
        with no_progress_bars(), _transformers_errors_only():
            checks = export_format.write(model.to(getattr(torch, args.dtype)), tokenizer, partial, args)
        manifest = _manifest(args, checks, partial)
        write_text(partial / EXPORT_MANIFEST, _to_json(manifest))
        if output.is_dir():
            _replace_files(partial, output, earlier, manifest)
        else:
            replace_directory(partial, output)
    print(_format_summary(args.output, manifest["files"], checks))
    return args.output


@contextmanager
def _temporary_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of `output`, and remove it at the end.

    Its name is hidden, since `output` with a suffix may be a folder of the user.
    """
    partial = output / _PARTIAL if output.is_dir() else output.with_name(f".{output.name}{_PARTIAL}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove_directory(partial)  # left by a killed process
    partial.mkdir()
    try:
        yield partial
    finally:
        remove_directory(partial)


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


def _earlier_files(args: ExportArgs, output: Path) -> set[str] | None:
    """Return the files in `output` that an earlier export wrote; None if its list does not name them.

    Raises:
        UserError: `output` exists and is neither an empty folder nor an earlier export.
    """
    if not output.exists() and not output.is_symlink():
        return set()
    manifest = output / EXPORT_MANIFEST
    if not output.is_dir() or not manifest.is_file():
        if output.is_dir() and all(path.name == _PARTIAL for path in output.iterdir()):
            return set()
        raise UserError(
            f"output ({args.output}) exists and is not an earlier export; choose another --output"
        )
    try:
        names = json.loads(manifest.read_text(encoding="utf-8")).get("files")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"output ({args.output}) has an {EXPORT_MANIFEST} that is not of an export; choose another one"
        ) from error
    if not isinstance(names, list):  # of an earlier version
        return None
    return {name for name in names if isinstance(name, str) and _is_inside(output, name)} | {EXPORT_MANIFEST}


def _is_inside(folder: Path, name: str) -> bool:
    """Whether `name`, which a file states, is a path in `folder`, and not reached through a symbolic link."""
    if not name.isprintable():  # no system call takes a NUL or an unpaired surrogate
        return False
    return (folder / name).parent.resolve().is_relative_to(folder.resolve()) and ".." not in Path(name).parts


def _replace_files(partial: Path, output: Path, earlier: set[str] | None, manifest: dict[str, Any]) -> None:
    """Move the files of `partial` to `output`, and delete the files that only the earlier export had.

    `export.json` lists both while files move: after a kill, the next export replaces them all.

    Raises:
        UserError: a file would replace one that no export wrote; nothing was changed.
    """
    files = manifest["files"]
    earlier = set(files) if earlier is None else earlier
    for name in files:
        if obstacle := _find_obstacle(output, name, is_ours=name in earlier):
            raise UserError(
                f"output ({output}) holds {obstacle}, which no export wrote; move it away, or choose another "
                "--output"
            )
    complete_directory(partial)
    while_moving = manifest | {"files": sorted({*files, *earlier})}
    write_text(output / EXPORT_MANIFEST, _to_json(while_moving))
    for name in (*(name for name in files if name != EXPORT_MANIFEST), EXPORT_MANIFEST):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, output / name)
    for name in sorted(earlier - set(files)):
        (output / name).unlink(missing_ok=True)
        for parent in (output / name).relative_to(output).parents[:-1]:
            with suppress(OSError):  # not empty
                (output / parent).rmdir()
    fsync_directory(output)


def _find_obstacle(output: Path, name: str, *, is_ours: bool) -> Path | None:
    """Return the path in `output` that keeps the file `name` from its place; None if nothing does."""
    if (output / name).is_dir() or (os.path.lexists(output / name) and not is_ours):
        return Path(name)
    return next((path for path in Path(name).parents if not _may_be_directory(output / path)), None)


def _may_be_directory(path: Path) -> bool:
    return path.is_dir() or not os.path.lexists(path)


def _manifest(args: ExportArgs, checks: list[EquivalenceCheck], folder: Path) -> dict[str, Any]:
    """Return the contents of export.json for the files in `folder`."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {
        "format": args.format,
        **{name: getattr(args, name) for name in EXPORT_FORMATS[args.format].recorded},
        "packages": {name: version(name) for name in ("tinystories_slm", "torch", "transformers")},
        "checks": [asdict(check) for check in checks],
        "files": sorted({*files, EXPORT_MANIFEST}),
    }


def _to_json(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _format_summary(output: Path, files: list[str], checks: list[EquivalenceCheck]) -> str:
    lines = [f"{(output / name).stat().st_size / 1e6:9.3f} MB  {output / name}" for name in files]
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


def _write_llama2c(model, tokenizer, folder: Path, args: ExportArgs) -> list[EquivalenceCheck]:
    from tinystories_slm.export.llama2c import export_llama2c

    return export_llama2c(model, tokenizer, folder)


def _write_onnx(model, tokenizer, folder: Path, args: ExportArgs) -> list[EquivalenceCheck]:
    from tinystories_slm.export.onnx import export_onnx

    return export_onnx(model, tokenizer, folder, vendor=args.vendor)


EXPORT_FORMATS: dict[str, ExportFormat] = {
    "custom": ExportFormat(write=_write_custom, recorded=("dtype",)),
    "native": ExportFormat(write=_write_native, recorded=("dtype",)),
    "gguf": ExportFormat(write=_write_gguf, packages=("gguf",), recorded=("quantization",)),
    "llama2c": ExportFormat(write=_write_llama2c),
    "onnx": ExportFormat(
        write=_write_onnx, packages=("onnx", "onnxruntime", "onnxscript", "transformers.exporters")
    ),
}
"""Formats by the name in `export --format`; docs/extending.md adds one."""
