"""A run's own files, as the public may see them; a file that is missing says nothing."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tinystories_slm.data.origin import BUILTIN
from tinystories_slm.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ABSOLUTE = re.compile(r"[/~]|\.{1,2}(/|$)|[A-Za-z]:[\\/]|file:")
_FOLDERS = ("output_dir", "data_dir")
_MODELS_AND_DATA = ("source", "pretrained", "init_from", "resume", "model", "data")
_TOLD = ("prompt", "story")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the files of a run folder hold, cleaned of local paths; `{}` or `[]` for one that is missing."""

    run_dir: Path
    config: dict[str, Any]
    """config.yaml."""
    manifest: dict[str, Any]
    evaluation: dict[str, Any]
    """evaluation.json, if its figures are of best/."""
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    stories: list[dict[str, Any]]
    """The lines of stories.jsonl that best/ told."""

    @classmethod
    def load(cls, run_dir: Path) -> "Record":
        """The record of the run in `run_dir`.

        Raises:
            InputError: it has no best/, or one of its files is broken.
        """
        if not (run_dir / "best" / "config.json").is_file():
            raise InputError(
                f"run ({run_dir}) is no run folder with a model in best/; give the output_dir of a run"
            )
        manifest = _read(run_dir / "manifest.json")
        local = str(manifest.get("revision", "")).startswith("sha256:")
        config = _read(run_dir / "config.yaml")
        evaluation = _read(run_dir / "evaluation.json")
        evaluated_locally = str(evaluation.get("revision", "")).startswith("sha256:")
        return cls(
            run_dir=run_dir,
            config=public(config, source_is_local=local),
            manifest=public(manifest, source_is_local=local),
            evaluation=public(evaluation, source_is_local=evaluated_locally) if _of_best(evaluation) else {},
            environment=public(_read(run_dir / "environment.json")),
            metrics=_read_lines(run_dir / "metrics.jsonl"),
            stories=[public(line) for line in _read_lines(run_dir / "stories.jsonl") if _of_best(line)],
        )

    @property
    def name(self) -> str:
        """Of the run folder."""
        return self.run_dir.resolve().name

    @property
    def source(self) -> str | None:
        """The stories' Hub id, `builtin`, or the bare name of local files; null if nothing tells."""
        return self.manifest.get("source", self.config.get("data", {}).get("source"))

    @property
    def source_on_hub(self) -> bool:
        """Whether the manifest says that the stories came from the Hub."""
        revision = self.manifest.get("revision")
        return revision is not None and self.source != BUILTIN and not revision.startswith("sha256:")


def public(values: dict[str, Any], *, source_is_local: bool = False) -> dict[str, Any]:
    """`values` with the last part of a path in the place of each path on this machine.

    A string is one if it looks absolute, or stands where a path may stand and is no Hub id.
    """
    return {key: _public(key, value, source_is_local) for key, value in values.items()}


def hub_id(value: object) -> str | None:
    """`value`, if it is the name of a repository on the Hub rather than of something on this disk."""
    return value if isinstance(value, str) and _is_hub_id(value) and "/" in value else None


def _public(key: str, value: Any, source_is_local: bool) -> Any:
    if isinstance(value, dict):
        return public(value, source_is_local=source_is_local)
    if isinstance(value, list):
        return [_public(key, item, source_is_local) for item in value]
    if not isinstance(value, str) or key in _TOLD:
        return value
    may_be_path = key in _MODELS_AND_DATA and (
        not _is_hub_id(value) or (source_is_local and key in ("source", "data"))
    )
    if _ABSOLUTE.match(value) or key in _FOLDERS or may_be_path:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _is_hub_id(value: str) -> bool:
    return _HUB_ID.fullmatch(value) is not None and not ("/" in value and Path(value).exists())


def _of_best(line: dict[str, Any]) -> bool:
    """Whether figures or a story are of the model in best/: a line that names another is not the card's."""
    return Path(str(line.get("model", "best"))).name == "best"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())}); repair or delete it"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no table of values; repair or delete it")
    return values


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON Lines; a last line that a killed run left unfinished is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return [line for line in lines if isinstance(line, dict)]
