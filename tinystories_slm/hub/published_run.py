"""Load a run for publication: the contents of its files, without paths of this machine."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinystories_slm.config import DataArgs, ModelArgs, RunConfig, TokenizerArgs, TrainArgs, to_dict
from tinystories_slm.data.sources.registry import find_recorded_source
from tinystories_slm.data.sources.story_source import StorySource
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import check_regular_files
from tinystories_slm.model_folder import MODEL_SUFFIXES
from tinystories_slm.runs.run_dir import RunDir, read_json_object

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ABSOLUTE_PATH = re.compile(r"[/~]|\.{1,2}(/|$)|[A-Za-z]:[\\/]|file:")
_DIRECTORY_KEYS = ("output_dir", "data_dir")
_PATH_OR_HUB_ID_KEYS = ("source", "pretrained", "init_from", "resume", "model", "data")
_TEXT_KEYS = ("prompt", "story")
_MANIFEST_TYPES = {"source": str, "revision": str, "splits": dict}


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """Contents of a run directory without local paths; `{}` or `[]` for a file that does not exist."""

    files: RunDir
    config: RunConfig | None
    """Configuration; None if the run has no config.yaml."""
    manifest: dict[str, Any]
    """Data manifest."""
    evaluation: dict[str, Any]
    """Evaluation metrics, if they belong to the model in best/."""
    environment: dict[str, Any]
    """Hardware, precision and package versions."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    stories: list[dict[str, Any]]
    """Lines of stories.jsonl that the model in best/ generated."""

    @classmethod
    def load(cls, run_dir: Path) -> "PublishedRun":
        """Load the run in `run_dir`.

        Raises:
            UserError: best/ does not hold a model, or a file is damaged.
        """
        files = RunDir(run_dir)
        files.check_files()
        check_regular_files(files.best, MODEL_SUFFIXES)
        if not (files.best / "config.json").is_file():
            raise UserError(
                f"run ({run_dir}) is not a run directory with a model in best/; use the output_dir of a run"
            )
        config = files.load_config()
        manifest = read_json_object(files.manifest, _MANIFEST_TYPES)
        evaluation = files.read_evaluation()
        if not files.records_of([files.best], [evaluation]):
            logger.warning(
                "%s is omitted: its weights are not those in best/; evaluate again with --output %s",
                files.evaluation, files.evaluation,
            )  # fmt: skip
            evaluation = {}
        revision = manifest.get("revision")
        return cls(
            files=files,
            config=config and _redact_config(config, revision),
            manifest=redact_paths(manifest, revision),
            evaluation=redact_paths(evaluation, evaluation.get("revision")),
            environment=redact_paths(files.read_environment()),
            metrics=files.read_metrics(),
            stories=[redact_paths(line) for line in files.records_of([files.best], files.read_stories())],
        )

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.files.path.resolve().name

    @property
    def source(self) -> str | None:
        """Hub id of the dataset, `builtin`, or the bare name of a local file; None if unknown."""
        return self.manifest.get("source", self.config.data.source if self.config else None)

    @property
    def story_source(self) -> StorySource | None:
        """The source that the manifest records; None if it is of no known kind."""
        source = self.source
        subset = self.manifest.get("subset")
        return None if source is None else find_recorded_source(source, self.manifest.get("revision"), subset)

    @property
    def base_model(self) -> str | None:
        """Hub id of the model that training started from; None for random weights or a local model."""
        init_from = self.config.model.init_from if self.config else None
        return init_from if init_from is not None and "/" in init_from and _is_hub_id(init_from) else None


def redact_paths(values: dict[str, Any], revision: str | None = None) -> dict[str, Any]:
    """Return `values` with every path of this machine reduced to its last part.

    A string is a path if it looks absolute, or if its key allows a path and it is not a Hub id. With the
    recorded `revision` of the data, a source is reduced to its public name.
    """
    return {key: _redact(key, value, revision) for key, value in values.items()}


def _redact_config(config: RunConfig, revision: str | None) -> RunConfig:
    values = redact_paths(to_dict(config), revision)
    data = values["data"] | {"data_dir": Path(values["data"]["data_dir"])}
    return RunConfig(
        output_dir=Path(values["output_dir"]),
        data=DataArgs(**data),
        tokenizer=TokenizerArgs(**values["tokenizer"]),
        model=ModelArgs(**values["model"]),
        train=TrainArgs(**values["train"]),
    )


def _redact(key: str, value: Any, revision: str | None) -> Any:
    if isinstance(value, dict):
        return redact_paths(value, revision)
    if isinstance(value, list):
        return [_redact(key, item, revision) for item in value]
    if not isinstance(value, str) or key in _TEXT_KEYS:
        return value
    if key in ("source", "data") and (source := find_recorded_source(value, revision)):
        return source.public_name()
    may_be_path = key in _PATH_OR_HUB_ID_KEYS and not _is_hub_id(value)
    if _ABSOLUTE_PATH.match(value) or key in _DIRECTORY_KEYS or may_be_path:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _is_hub_id(value: str) -> bool:
    return _HUB_ID.fullmatch(value) is not None and not ("/" in value and Path(value).exists())
