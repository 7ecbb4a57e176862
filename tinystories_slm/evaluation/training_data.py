"""Record of the stories that a model was trained on, in the config.json of every form of the model.

The record travels with the weights: to copies, exports and the Hub. Evaluation reads it to leave out, or to
count, the stories that the model was trained on.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self

from transformers import PreTrainedConfig

from tinystories_slm.data.provenance import Provenance
from tinystories_slm.data.sources.mixture import MixtureSource
from tinystories_slm.data.sources.registry import find_recorded_source
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
    subset: str | None = None
    cleaning: list[str] = field(default_factory=list)
    """Names of the cleaning rules: the stories of the run are the cleaned ones."""
    num_parts: int = 1
    """Records of the run, which follow one another: one for each part of a mixture."""

    @classmethod
    def of_run(cls, data: Provenance) -> list[Self]:
        """Return the records of a run on prepared data: one, or one for each part of a mixture."""
        mixture = find_recorded_source(data.source, data.revision)
        if isinstance(mixture, MixtureSource):
            revisions = map(str, mixture.split_revision(data.revision))
            parts = [
                (part.name, revision, part.subset)
                for part, revision in zip(mixture.parts, revisions, strict=True)
            ]
        else:
            parts = [(data.source, data.revision, data.subset)]
        return [
            cls(
                source=source_name(source, revision),
                revision=revision,
                validation_split=data.validation_split,
                validation_fraction=data.validation_fraction,
                # How many stories of a part the limit of a mixture left out is not recorded.
                max_stories=data.max_stories if len(parts) == 1 else None,
                subset=subset,
                cleaning=data.cleaning,
                num_parts=len(parts),
            )
            for source, revision, subset in parts
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as it stands in config.json."""
        return asdict(self)

    def is_from(self, source: str, revision: str, subset: str | None = None) -> bool:
        """Whether `source` at `revision` is the source of these stories, or another version of it.

        A local source is recognized by its contents or by its name: an edited file keeps most of its stories.
        Named sets and configurations of one dataset have the same commit and other stories.
        """
        if source_name(source, revision) == self.source and subset == self.subset:
            return True
        found = find_recorded_source(source, revision, subset)
        own = find_recorded_source(self.source, self.revision, self.subset)
        is_part = any(one is not None and one.is_part_of_revision for one in (found, own))
        return revision == self.revision and not is_part


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
        names = [item.name for item in fields(TrainingData)]
        required = {
            item.name
            for item in fields(TrainingData)
            if item.default is MISSING and item.default_factory is MISSING
        }
        complete = [record for record in records if isinstance(record, dict) and required <= record.keys()]
        if complete:
            return [
                TrainingData(**{name: record[name] for name in names if name in record})
                for record in complete
            ]
    folder = expand_user(model)
    run_dir = RunDir(folder.resolve().parent)
    manifest = run_dir.load_manifest() if folder.is_dir() and run_dir.config.is_file() else None
    return TrainingData.of_run(manifest.provenance) if manifest else None


def num_records_of_last_run(trained_on: Sequence[TrainingData]) -> int:
    """Return how many of the last records are those of the last run: several if it read a mixture."""
    return trained_on[-1].num_parts
