"""What goes to the Hub: the files of a list, and nothing that tells of this machine."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token

from tinystories_slm.errors import InputError
from tinystories_slm.export import ExportArgs, export
from tinystories_slm.hub.card import Publication, render_card
from tinystories_slm.hub.record import Record
from tinystories_slm.model import configuration_tinystories

_REQUIRED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_MODEL = (*_REQUIRED, "generation_config.json", "chat_template.jinja")
CODE_FILES = ("configuration_tinystories.py", "modeling_tinystories.py")
_NATIVE = (*_MODEL, "export.json")
_RECORD = ("loss.png", "metrics.jsonl", "samples.md")
"""Of the run folder, as they are; what else goes to run/ is written anew, cleaned of paths."""

FILES = (
    "README.md",
    *_MODEL,
    *CODE_FILES,
    "export.json",
    *(f"native/{name}" for name in _NATIVE),
    *(f"run/{name}" for name in _RECORD),
    *(f"run/{name}" for name in ("config.yaml", "manifest.json", "evaluation.json")),
    *(f"run/{name}" for name in ("environment.json", "stories.jsonl")),
)
"""Every name that a push may ever upload."""

_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{16,}")


def stage(
    run_dir: Path, folder: Path, *, repo_id: str, formats: Iterable[str], license: str | None
) -> list[Path]:
    """Fill the empty `folder` with the repository as it shall be.

    Returns:
        The files, sorted, each relative to `folder` and in `FILES`.

    Raises:
        InputError: the run lacks a part of its model, or a file holds a local path or a token.
    """
    record = Record.load(run_dir)
    best, formats = run_dir / "best", list(formats)
    custom = "custom" in formats
    native = None if "native" not in formats else folder / "native" if custom else folder
    if custom:
        _copy(best, folder, (*_MODEL, *CODE_FILES), required=(*_REQUIRED, *CODE_FILES))
    if native:
        made = folder / ".native"
        with contextlib.redirect_stdout(io.StringIO()):  # its table of files, in a folder that goes away
            export(ExportArgs(model=str(best), format="native", output=made))
        native.mkdir(exist_ok=True)
        _copy(made, native, _NATIVE, required=_REQUIRED)
        shutil.rmtree(made)
    _stage_record(record, folder / "run", repo_id)
    publication = Publication(
        model_id=repo_id,
        on_hub=True,
        custom=custom,
        native_class=_architecture(native) if native else None,
        license=license,
    )
    (folder / "README.md").write_text(render_card(record, publication), encoding="utf-8")
    files = [Path(name) for name in sorted(FILES) if (folder / name).is_file()]
    _refuse_private(folder, files, run_dir)
    return files


def stage_code(folder: Path) -> list[Path]:
    """Fill the empty `folder` with the model's code files, as the installed package has them.

    Returns:
        The files, each relative to `folder`.
    """
    _copy(Path(configuration_tinystories.__file__).parent, folder, CODE_FILES, required=CODE_FILES)
    return [Path(name) for name in CODE_FILES]


def _copy(source: Path, folder: Path, names: Iterable[str], *, required: Iterable[str] = ()) -> None:
    """The files of `names` that are there; `required` ones have to be."""
    missing = [name for name in required if not (source / name).is_file()]
    if missing:
        raise InputError(f"{source} lacks {', '.join(missing)}; train again, or give another --run")
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _stage_record(record: Record, folder: Path, repo_id: str) -> None:
    folder.mkdir()
    _copy(record.run_dir, folder, _RECORD)
    if record.config:
        text = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    for name in ("manifest", "evaluation", "environment"):
        if values := getattr(record, name):
            text = json.dumps(_told_by(values, repo_id), indent=2, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if record.stories:
        lines = [json.dumps(_told_by(line, repo_id), ensure_ascii=False) + "\n" for line in record.stories]
        (folder / "stories.jsonl").write_text("".join(lines), encoding="utf-8")


def _told_by(values: dict[str, Any], repo_id: str) -> dict[str, Any]:
    """With the repository's name where the model's folder stood: they are of the model it holds."""
    return values | ({"model": repo_id} if "model" in values else {})


def _architecture(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]


def _refuse_private(folder: Path, files: Iterable[Path], run_dir: Path) -> None:
    """Refuse, by name, a file that holds a path of this machine or an access token.

    Raises:
        InputError: so it is, and nothing has been uploaded.
    """
    secrets = [
        ("a path in this user's home folder", f"{Path.home().as_posix().rstrip('/')}/"),
        ("the run's path", run_dir.resolve().as_posix()),
        ("the run's path", run_dir.absolute().as_posix()),
        ("your access token", get_token() or ""),
    ]
    for path in files:
        data = _readable(folder / path)
        found = [what for what, secret in secrets if len(secret) > 1 and secret.encode() in data]
        if _TOKEN.search(data):
            found.append("an access token (hf_...)")
        if found:
            raise InputError(
                f"{path.as_posix()} holds {found[0]}, so nothing was uploaded; take it out of the run's file"
            )


def _readable(path: Path) -> bytes:
    """What of a file could be text: of weights their header alone, as by chance numbers spell anything."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little"))
        return file.read()
