"""Provenance of prepared data: source, revision and options, recorded by each preparation step."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints, is_typeddict

from tinystories_slm.config import DataArgs
from tinystories_slm.data.sources.registry import find_recorded_source
from tinystories_slm.errors import UserError

logger = logging.getLogger(__name__)

_COMPARED = (
    *("source", "subset", "text_column", "validation_split", "validation_fraction", "max_stories"),
    *("canaries", "streaming"),
)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Options `data.*` that select the stories, and the exact revision they resolved to."""

    source: str
    revision: str
    """Hub commit, `grammar VERSION` for `builtin`, or `sha256:...` for local files."""
    requested_revision: str | None
    """`data.revision` as configured."""
    text_column: str
    validation_split: str
    validation_fraction: float
    max_stories: int | None
    subset: str | None = None
    """`data.subset`; manifests of earlier versions lack it."""
    cleaning: list[str] = field(default_factory=list)
    """Names of the rules in `cleaning.RULES` that were applied; none in manifests of earlier versions."""
    canaries: str | None = None
    """`data.canaries`; manifests of earlier versions lack it."""
    deduplicated: bool = False
    """Whether near duplicates and repeated validation stories were dropped from training."""
    streaming: bool = False
    """Whether the files hold a sample, and runs read the training stories from the source."""

    @classmethod
    def from_args(
        cls, data: DataArgs, revision: str, *, cleaning: Iterable[str] = (), deduplicated: bool = False
    ) -> "Provenance":
        """Return the provenance of the stories that `data` selects, at the resolved `revision`."""
        return Provenance(
            source=data.source,
            revision=revision,
            requested_revision=data.revision,
            text_column=data.text_column,
            validation_split=data.validation_split,
            validation_fraction=data.validation_fraction,
            max_stories=data.max_stories,
            subset=data.subset,
            cleaning=list(cleaning),
            canaries=data.canaries,
            deduplicated=deduplicated,
            streaming=data.streaming,
        )

    def differences(self, data: DataArgs) -> list[str]:
        """Return one phrase for each difference between this provenance and the options `data`."""
        found = [
            f"data.{name} is {getattr(self, name)!r} (configured: {getattr(data, name)!r})"
            for name in _COMPARED
            if getattr(self, name) != getattr(data, name)
        ]
        for name, recorded in (("cleaning", bool(self.cleaning)), ("deduplicate", self.deduplicated)):
            if (configured := getattr(data, name)) not in (None, recorded):
                found.append(f"data.{name} is {recorded} (configured: {configured})")
        if data.revision not in (None, self.requested_revision, self.revision):
            recorded = self.requested_revision or self.revision
            found.append(f"data.revision is {recorded!r} (configured: {data.revision!r})")
        is_same_source = (self.source, self.subset) == (data.source, data.subset)
        if is_same_source and (current := self._current_revision()) != self.revision:
            found.append(f"data.source {self.source!r} has changed from {self.revision} to {current}")
        return found

    def _current_revision(self) -> str:
        """Return the current revision of the source, or the recorded one if it is fixed or unavailable."""
        source = find_recorded_source(self.source, self.revision, self.subset)
        return self.revision if source is None else source.current_revision(self.revision)


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """Record of a preparation step in a JSON file, whose first keys are the fields of `provenance`."""

    provenance: Provenance

    def save(self, path: Path) -> None:
        """Write every field as JSON."""
        values = asdict(self)
        text = json.dumps(values.pop("provenance") | values, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load the JSON file that `save` wrote to `path`.

        Raises:
            UserError: the file is missing, damaged, or from an incompatible version of this package.
        """
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise OSError("it must be a regular file")
            values = _rename_old_fields(json.loads(path.read_text(encoding="utf-8")))
            names = [item.name for item in fields(Provenance) if item.name in values]
            provenance = Provenance(**{name: values.pop(name) for name in names})
            manifest = cls(provenance=provenance, **values)
            _check_types(provenance)
            _check_types(manifest)
            return manifest
        except (OSError, AttributeError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read by this version ({error}); "
                "delete the contents of its folder to rebuild them, or use another --data.data_dir"
            ) from error


def _check_types(record: object) -> None:
    """Check the values of a dataclass against its annotations, and that both splits have stories.

    Raises:
        TypeError: a value is of another type, or a split is missing or empty.
    """
    for name, kind in get_type_hints(type(record)).items():
        value = getattr(record, name)
        is_valid = _has_type(value, kind)
        if is_valid and name == "splits":
            is_valid = all(_is_filled(value.get(split, {})) for split in ("train", "validation"))
        if not is_valid:
            raise TypeError(f"{name} is {str(value)[:50]!r}")


def _has_type(value: object, kind: Any) -> bool:
    """Whether a value from a JSON file is as the annotation `kind` says."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(item, parts[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_has_type(item, parts[1]) for item in value.values())
    if is_typeddict(kind):
        names = get_type_hints(kind).items()
        return isinstance(value, dict) and all(
            name in value and _has_type(value[name], part) for name, part in names
        )
    if kind in (int, float) and isinstance(value, int):
        return type(value) is int and abs(value) < 2**63
    return isinstance(value, kind)


def _is_filled(counts: dict[str, int]) -> bool:
    return bool(counts) and all(count >= (0 if "dropped" in name else 1) for name, count in counts.items())


def _rename_old_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the field that earlier versions called `validation`, with the values auto and cut."""
    if "validation" in values:
        earlier = values.pop("validation")
        values["validation_split"] = "holdout" if earlier == "cut" else earlier
    return values


def log_rebuild(what: str, data_dir: Path, differences: list[str]) -> None:
    """Warn that existing data are built again, with every reason."""
    logger.warning("building %s of %s again: %s", what, data_dir, "; ".join(differences))
