"""Provenance of prepared data: source, revision and options, recorded by each preparation step."""

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from tinystories_slm import grammar
from tinystories_slm.config import DataArgs
from tinystories_slm.data import local
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import expand_user

logger = logging.getLogger(__name__)

BUILTIN = "builtin"
"""Value of `data.source` for the built-in corpus, which `tinystories_slm.grammar` generates."""


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
        )

    def provenance_fields(self) -> dict[str, Any]:
        """Return the fields of `Provenance` only, for the manifest of the next step."""
        return {field.name: getattr(self, field.name) for field in fields(Provenance)}

    def save(self, path: Path) -> None:
        """Write every field as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load the JSON file that `save` wrote to `path`.

        Raises:
            UserError: the file is missing, damaged, or from an incompatible version of this package.
        """
        try:
            return cls(**_rename_old_fields(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read by this version ({error}); "
                "delete the contents of its folder to rebuild them, or use another --data.data_dir"
            ) from error

    def differences(self, data: DataArgs) -> list[str]:
        """Return one phrase for each difference between this provenance and the options `data`."""
        found = [
            f"data.{name} is {getattr(self, name)!r} (configured: {getattr(data, name)!r})"
            for name in ("source", "text_column", "validation_split", "validation_fraction", "max_stories")
            if getattr(self, name) != getattr(data, name)
        ]
        if data.revision not in (None, self.requested_revision, self.revision):
            recorded = self.requested_revision or self.revision
            found.append(f"data.revision is {recorded!r} (configured: {data.revision!r})")
        if self.source == data.source and (current := self._current_revision()) != self.revision:
            found.append(f"data.source {self.source!r} has changed from {self.revision} to {current}")
        return found

    def _current_revision(self) -> str:
        """Return the current revision of the source, or the recorded one if it is fixed or unavailable."""
        if self.source == BUILTIN:
            return f"grammar {grammar.VERSION}"
        if not self.revision.startswith("sha256:"):
            return self.revision  # a commit on the Hub does not change
        if not expand_user(self.source).exists():
            logger.warning(
                "%s no longer exists; using the stories downloaded from it earlier; for other stories, "
                "set --data.source",
                self.source,
            )
            return self.revision
        return local.content_hash(self.source)


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
