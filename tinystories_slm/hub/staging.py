"""Collect the files of a push in a temporary directory: listed names only, without local paths or tokens."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from tinystories_slm.config import save_config
from tinystories_slm.config.command_args.publish import ExportArgs
from tinystories_slm.errors import UserError
from tinystories_slm.export import export
from tinystories_slm.hub.card import CardTarget, render_card
from tinystories_slm.hub.published_run import PublishedRun
from tinystories_slm.io.file_errors import check_regular_files
from tinystories_slm.model import configuration_tinystories
from tinystories_slm.model_folder import MODEL_SUFFIXES
from tinystories_slm.runs.run_dir import RunDir, read_json_object

_REQUIRED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_MODEL = (*_REQUIRED, "generation_config.json", "chat_template.jinja")
CODE_FILES = ("configuration_tinystories.py", "modeling_tinystories.py")
_NATIVE = (*_MODEL, "export.json")

_PUBLISHED = RunDir(Path("run"))
_COPIED = tuple(
    path.name
    for path in (_PUBLISHED.loss_plot, _PUBLISHED.metrics, _PUBLISHED.samples, _PUBLISHED.extensions)
)
"""Files of the run directory that are copied; the others are written again without local paths."""
_REWRITTEN = tuple(
    path.name
    for path in (
        _PUBLISHED.config,
        _PUBLISHED.manifest,
        _PUBLISHED.evaluation,
        _PUBLISHED.environment,
        _PUBLISHED.stories,
    )
)

FILES = (
    "README.md",
    *_MODEL,
    *CODE_FILES,
    "export.json",
    *(f"native/{name}" for name in _NATIVE),
    *(f"run/{name}" for name in (*_COPIED, *_REWRITTEN)),
)
"""Every name that a push can upload."""

_STEP_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}, step {step}

The model after optimizer step {step} of the run that is described in the card of
[{repo_id}](https://huggingface.co/{repo_id}).{averaged}
"""

_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{16,}")


def stage(
    run_dir: Path, folder: Path, *, repo_id: str, formats: Iterable[str], license: str | None
) -> list[Path]:
    """Fill the empty `folder` with the files of the repository.

    Returns:
        The files, sorted, each relative to `folder` and in `FILES`.

    Raises:
        UserError: a file of the model is missing, or a file holds a local path or a token.
    """
    run, formats = PublishedRun.load(run_dir), list(formats)
    native = _stage_model(run.files.best, folder, formats)
    _stage_records(run, folder / "run", repo_id)
    target = CardTarget(
        model_id=repo_id,
        on_hub=True,
        custom="custom" in formats,
        native_class=_model_class(native) if native else None,
        license=license,
    )
    (folder / "README.md").write_text(render_card(run, target), encoding="utf-8")
    return _listed_files(folder, run_dir)


def stage_step(run_dir: Path, step: int, folder: Path, *, repo_id: str, formats: Iterable[str]) -> list[Path]:
    """Fill the empty `folder` with the model of a kept step and a short card.

    Returns:
        The files, sorted, each relative to `folder` and in `FILES`.

    Raises:
        UserError: a file of the model is missing, or a file holds a local path or a token.
    """
    model = RunDir(run_dir).step(step)
    check_regular_files(model, MODEL_SUFFIXES)
    _stage_model(model, folder, list(formats))
    decay = read_json_object(model / "config.json").get("ema_decay")
    averaged = "" if decay is None else f" It is a moving average of the weights with decay {decay}."
    (folder / "README.md").write_text(
        _STEP_CARD.format(name=repo_id.partition("/")[2], repo_id=repo_id, step=step, averaged=averaged),
        encoding="utf-8",
    )
    return _listed_files(folder, run_dir)


def _stage_model(source: Path, folder: Path, formats: list[str]) -> Path | None:
    """Copy the model in `source` in the `formats`, and return the folder of the native one, if it is one."""
    custom = "custom" in formats
    native = None if "native" not in formats else folder / "native" if custom else folder
    if custom:
        _copy_files(source, folder, (*_MODEL, *CODE_FILES), required=(*_REQUIRED, *CODE_FILES))
    if native:
        _stage_native(source, native, folder / ".native")
    return native


def _listed_files(folder: Path, run_dir: Path) -> list[Path]:
    files = [Path(name) for name in sorted(FILES) if (folder / name).is_file()]
    check_no_secrets(folder, files, run_dir)
    return files


def stage_code(folder: Path) -> list[Path]:
    """Fill the empty `folder` with the model's code files of the installed package.

    Returns:
        The files, each relative to `folder`.
    """
    _copy_files(Path(configuration_tinystories.__file__).parent, folder, CODE_FILES, required=CODE_FILES)
    return [Path(name) for name in CODE_FILES]


def _copy_files(source: Path, folder: Path, names: Iterable[str], *, required: Iterable[str] = ()) -> None:
    """Copy the files of `names` that exist.

    Raises:
        UserError: a file of `required` does not exist.
    """
    missing = [name for name in required if not (source / name).is_file()]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}; train again, or set --run to another run")
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _stage_native(best: Path, native: Path, temporary: Path) -> None:
    """Export the model in `best` as a class of transformers, into `native`."""
    with contextlib.redirect_stdout(io.StringIO()):  # export prints a table with temporary paths
        export(ExportArgs(model=str(best), format="native", output=temporary))
    native.mkdir(exist_ok=True)
    _copy_files(temporary, native, _NATIVE, required=_REQUIRED)
    shutil.rmtree(temporary)


def _stage_records(run: PublishedRun, folder: Path, repo_id: str) -> None:
    """Write the records of the run without local paths."""
    folder.mkdir()
    _copy_files(run.files.path, folder, _COPIED)
    staged = RunDir(folder)
    if run.config is not None:
        save_config(run.config, staged.config)
    for path, values in (
        (staged.manifest, run.manifest),
        (staged.evaluation, run.evaluation),
        (staged.environment, run.environment),
    ):
        if values:
            text = json.dumps(_with_repo_id(values, repo_id), indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
    if run.stories:
        lines = [json.dumps(_with_repo_id(line, repo_id), ensure_ascii=False) + "\n" for line in run.stories]
        staged.stories.write_text("".join(lines), encoding="utf-8")


def _with_repo_id(values: dict[str, Any], repo_id: str) -> dict[str, Any]:
    """Return `values` with `model` set to the repository, which holds that model; other values stay."""
    return values | ({"model": repo_id} if "model" in values else {})


def _model_class(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]


def check_no_secrets(folder: Path, files: Iterable[Path], run_dir: Path, *, owner: str = "the run") -> None:
    """Check that no file holds a path of this machine, as that of `owner` in `run_dir`, or an access token.

    Raises:
        UserError: a file does; the message names the file but not the token.
    """
    home = Path(os.path.expanduser("~"))  # `Path.home` raises an exception in a container without users
    secrets = [
        (
            "a path in this user's home directory",
            f"{home.as_posix().rstrip('/')}/" if home != Path("~") else "",
        ),
        (f"{owner}'s path", run_dir.resolve().as_posix()),
        (f"{owner}'s path", run_dir.absolute().as_posix()),
        ("your access token", get_token() or ""),
    ]
    for path in files:
        data = _scannable_bytes(folder / path)
        found = [kind for kind, secret in secrets if len(secret) > 1 and secret.encode() in data]
        if _TOKEN.search(data):
            found.append("an access token (hf_...)")
        if found:
            raise UserError(
                f"{path.as_posix()} holds {found[0]}, so nothing was uploaded; remove it from the file of "
                f"{owner}"
            )


def _scannable_bytes(path: Path) -> bytes:
    """Return the bytes to scan for secrets: of safetensors only the header, as weights match by chance."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little"))
        return file.read()
