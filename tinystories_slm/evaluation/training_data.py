"""Record of the stories that a model was trained on, in the config.json of every form of the model.

The record travels with the weights: to copies, exports and the Hub. Evaluation reads it to leave out, or to
count, the stories that the model was trained on.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from transformers import PreTrainedConfig

from tinystories_slm.data.provenance import Provenance
from tinystories_slm.data.source_registry import find_recorded_source
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.runs.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Stories of one training run, as options of `data.*`; it contains no path."""

    source: str
    """`builtin`, a Hub dataset id, or the name of a local file or folder."""
    revision: str
    """Hub commit, `grammar VERSION` for `builtin`, or `sha256:...` of local files."""
    validation_split: str
    validation_fraction: float
    max_stories: int | None

    @classmethod
    def from_provenance(cls, data: Provenance) -> Self:
        """Return the record of a run on prepared data."""
        return cls(
            source=source_name(data.source, data.revision),
            revision=data.revision,
            validation_split=data.validation_split,
            validation_fraction=data.validation_fraction,
            max_stories=data.max_stories,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as it stands in config.json."""
        return asdict(self)

    def is_from(self, source: str, revision: str) -> bool:
        """Whether `source` at `revision` is the source of these stories, or another version of it.

        A local source is recognized by its contents or by its name: an edited file keeps most of its stories.
        """
        return revision == self.revision or source_name(source, revision) == self.source


def source_name(source: str, revision: str) -> str:
    """Return the name of `source` without the path of a local one."""
    recorded = find_recorded_source(source, revision)
    return source if recorded is None else recorded.public_name()


def read_training_data(model: str, config: PreTrainedConfig) -> list[TrainingData] | None:
    """Return what the model in the folder or Hub id `model` was trained on, one record per training run.

    The first record is that of the model that training started from, if it has one. Folders of earlier
    versions have no record; the run directory around such a folder states the data.

    Returns:
        None if nothing states the data, as for models that were not trained here.
    """
    records = getattr(config, "training_data", None)
    if isinstance(records, list):
        names = [field.name for field in fields(TrainingData)]
        complete = [record for record in records if isinstance(record, dict) and {*names} <= record.keys()]
        if complete:
            return [TrainingData(**{name: record[name] for name in names}) for record in complete]
    folder = expand_user(model)
    run_dir = RunDir(folder.resolve().parent)
    manifest = run_dir.load_manifest() if folder.is_dir() and run_dir.config.is_file() else None
    return [TrainingData.from_provenance(manifest.provenance)] if manifest else None
