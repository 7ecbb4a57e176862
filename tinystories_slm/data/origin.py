"""Which stories a folder of data was made of: the record that each step leaves beside its files."""

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from tinystories_slm.config import DataArgs
from tinystories_slm.data import builtin, local
from tinystories_slm.errors import InputError

logger = logging.getLogger(__name__)

BUILTIN = "builtin"
"""`data.source` of the stories that the package's own grammar tells."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What `data.*` asked for, and the revision that this meant."""

    source: str
    revision: str
    """A Hub commit, `grammar VERSION` of `builtin`, or `sha256:...` of local files."""
    requested_revision: str | None
    """`data.revision` as configured."""
    text_column: str
    validation: str
    validation_fraction: float
    max_stories: int | None

    @classmethod
    def of(cls, data: DataArgs, revision: str) -> "Origin":
        """The stories that `data` asks for, at the `revision` it was resolved to."""
        return Origin(
            source=data.source,
            revision=revision,
            requested_revision=data.revision,
            text_column=data.text_column,
            validation=data.validation,
            validation_fraction=data.validation_fraction,
            max_stories=data.max_stories,
        )

    def origin_fields(self) -> dict[str, Any]:
        """The fields of `Origin` alone, for the record of the next step."""
        return {field.name: getattr(self, field.name) for field in fields(Origin)}

    def save(self, path: Path) -> None:
        """Write every field as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote to `path`.

        Raises:
            InputError: it is missing, broken, or of another version of this program.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as a record of this version ({error}); "
                "delete its folder's contents to make them anew, or choose another --data.data_dir"
            ) from error

    def differences(self, data: DataArgs) -> list[str]:
        """How these stories differ from those that `data` asks for, one phrase each."""
        found = [
            f"data.{name} is {getattr(self, name)!r} there, {getattr(data, name)!r} here"
            for name in ("source", "text_column", "validation", "validation_fraction", "max_stories")
            if getattr(self, name) != getattr(data, name)
        ]
        if data.revision not in (None, self.requested_revision, self.revision):
            there = self.requested_revision or self.revision
            found.append(f"data.revision is {there!r} there, {data.revision!r} here")
        if self.source == data.source and (now := self._revision_now()) != self.revision:
            found.append(f"data.source {self.source!r} has changed since: {self.revision} there, {now} now")
        return found

    def _revision_now(self) -> str:
        """What the source is at this moment; the recorded revision where it cannot or need not be asked."""
        if self.source == BUILTIN:
            return f"grammar {builtin.VERSION}"
        if not self.revision.startswith("sha256:"):
            return self.revision  # a commit on the Hub does not change
        if not Path(self.source).expanduser().exists():
            logger.warning("%s is gone; going on with the stories taken from it before", self.source)
            return self.revision
        return local.digest(self.source)


def refuse_other(data_dir: Path, differences: list[str], delete: str = "that folder") -> None:
    """Refuse, in one line, data made with other settings: nothing is overwritten or silently reused.

    Raises:
        InputError: there are `differences`.
    """
    if differences:
        raise InputError(
            f"data.data_dir ({data_dir}) holds other data: {'; '.join(differences)}. "
            f"Choose another --data.data_dir, or delete {delete} to make it anew"
        )
