"""Provenance of prepared data: source, revision and options, recorded by each preparation step."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from tinystories_slm.config import DataArgs
from tinystories_slm.data.source_registry import find_recorded_source
from tinystories_slm.errors import UserError

_COMPARED = ("source", "subset", "text_column", "validation_split", "validation_fraction", "max_stories")


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

    @classmethod
    def from_args(cls, data: DataArgs, revision: str) -> "Provenance":
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
        )

    def differences(self, data: DataArgs) -> list[str]:
        """Return one phrase for each difference between this provenance and the options `data`."""
        found = [
            f"data.{name} is {getattr(self, name)!r} (configured: {getattr(data, name)!r})"
            for name in _COMPARED
            if getattr(self, name) != getattr(data, name)
        ]
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
            values = _rename_old_fields(json.loads(path.read_text(encoding="utf-8")))
            names = [field.name for field in fields(Provenance) if field.name in values]
            provenance = Provenance(**{name: values.pop(name) for name in names})
            return cls(provenance=provenance, **values)
        except (OSError, AttributeError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read by this version ({error}); "
                "delete the contents of its folder to rebuild them, or use another --data.data_dir"
            ) from error


def _rename_old_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the field that earlier versions called `validation`, with the values auto and cut."""
    if "validation" in values:
        earlier = values.pop("validation")
        values["validation_split"] = "holdout" if earlier == "cut" else earlier
    return values


def raise_if_different(data_dir: Path, differences: list[str], delete: str = "that folder") -> None:
    """Reject data prepared with other options, so that data is never overwritten or reused by mistake.

    Raises:
        UserError: `differences` is not empty; the message lists all of them.
    """
    if differences:
        raise UserError(
            f"data.data_dir ({data_dir}) contains data prepared with other options: "
            f"{'; '.join(differences)}. Use another --data.data_dir, or delete {delete} to rebuild the data"
        )
