"""Base class of the sources of stories: `source_registry.SOURCES` has an entry for each kind."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import ClassVar

from tinystories_slm.data import folder_names

Splits = dict[str, Callable[[], Iterable[str | None]]]
"""Split name -> function that opens the split and yields its texts, with `None` for a null."""


class StorySource(ABC):
    """One value of `data.source`: its stories, and the facts that the rest of the package needs."""

    has_revisions: ClassVar[bool] = False
    """Whether `data.revision` selects a version, as on the Hub. A recorded one does not change."""
    needs_network: ClassVar[bool] = False
    """Whether the stories are downloaded; then `num_download_bytes` is defined."""
    is_builtin_corpus: ClassVar[bool] = False
    """Whether the grammar of this package generates the stories, so that their entropy is known."""

    def __init__(self, value: str) -> None:
        self.value = value

    @classmethod
    @abstractmethod
    def matches(cls, value: str) -> bool:
        """Whether `value` of `data.source` belongs to this entry."""

    @classmethod
    def matches_record(cls, value: str, revision: str) -> bool:
        """Whether this entry recorded the source `value` at `revision`; the source may no longer exist."""
        return cls.matches(value)

    @abstractmethod
    def resolve_revision(self, requested: str | None) -> str:
        """Return the exact revision of the stories; `requested` is `data.revision`.

        Raises:
            UserError: the source or revision does not exist, or cannot be reached.
        """

    @abstractmethod
    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
        """Return the splits without reading any story.

        Args:
            revision: `data.revision`, or the revision that it resolved to.
            text_column: Column or key of the texts, if the stories have several.
            max_stories: Number of training texts that are read, for sources of any length; null for all.

        Raises:
            UserError: the source or revision does not exist, or cannot be read.
        """

    def local_path(self) -> Path | None:
        """Return the file or folder of this machine that holds the stories, if there is one."""
        return None

    def public_name(self) -> str:
        """Return the value without a path of this machine, for files that are published."""
        return self.value if self.local_path() is None else re.sub(r"[^:]*[/\\]", "", self.value)

    def folder_name(self) -> str | None:
        """Return the name of the folders of its data and runs; None for those of the preset."""
        return folder_names.folder_name(self.value)

    def num_download_bytes(self, revision: str | None, splits: Collection[str]) -> int:
        """Return the bytes that reading `splits` downloads.

        Raises:
            UserError: the source or revision does not exist, or cannot be reached.
        """
        return 0

    @property
    def label(self) -> str | None:
        """Name in a sentence; None for the value itself."""
        return None

    @property
    def dataset_id(self) -> str | None:
        """Hub id of the dataset, for the metadata of a model card."""
        return None

    @property
    def license(self) -> str | None:
        """License of the stories in Markdown; None if it is not known."""
        return None
