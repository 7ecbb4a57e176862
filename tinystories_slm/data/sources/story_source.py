"""Base class of the sources of stories: `registry.SOURCES` has an entry for each kind."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

from tinystories_slm.data.sources import folder_names
from tinystories_slm.errors import UserError

logger = logging.getLogger(__name__)

Splits = dict[str, Callable[[], Iterable[str | None]]]
"""Split name -> function that opens the split and yields its texts, with `None` for a null."""


class FileSequence:
    """A split of several files, each a function as in `Splits`; a stream resumes at the start of any file."""

    def __init__(self, files: Sequence[Callable[[], Iterable[str | None]]]) -> None:
        self.files = files

    def __call__(self) -> Iterator[str | None]:
        return chain.from_iterable(read() for read in self.files)


class ResumedSplit:
    """Split that is read once, from a position on; the files before it are not read."""

    def __init__(self, read: Callable[[], Iterable[str | None]], file: int = 0, row: int = 0) -> None:
        self.file = file
        """Number of the file that is read."""
        self.row = row
        """Number of texts of the file that were read."""
        self._files: Sequence[Callable[[], Iterable[str | None]]] = getattr(read, "files", [read])

    def __call__(self) -> Iterator[str | None]:
        while self.file < len(self._files):
            for text in islice(self._files[self.file](), self.row, None):
                self.row += 1
                yield text
            self.file, self.row = self.file + 1, 0


class StorySource(ABC):
    """One value of `data.source`: its stories, and the facts that the rest of the package needs."""

    has_revisions: ClassVar[bool] = False
    """Whether `data.revision` selects a version, as on the Hub. A recorded one does not change."""
    needs_network: ClassVar[bool] = False
    """Whether the stories are downloaded; then `num_download_bytes` is defined."""
    is_builtin_corpus: ClassVar[bool] = False
    """Whether the grammar of this package generates the stories, so that their entropy is known."""

    is_filtered_by_default: ClassVar[bool] = False
    """Whether its stories are cleaned and deduplicated unless the options say otherwise."""

    has_subsets: ClassVar[bool] = False
    """Whether `data.subset` selects a configuration, as of a dataset on the Hub."""

    subset: str | None = None
    """Configuration that `data.subset` selects; null for the default one."""

    is_streamed: bool = False
    """Whether `open_splits` reads files of the Hub over the network, without a copy on this disk."""

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

    def local_paths(self) -> Sequence[Path]:
        """Return the files and folders of this machine that hold the stories."""
        path = self.local_path()
        return [] if path is None else [path]

    def check_exists(self) -> None:
        """Check a path on this machine, and whether the source has configurations if one is chosen.

        Raises:
            UserError: the path does not exist, or the source has no configurations.
        """
        path = self.local_path()
        if not self.value or (path is not None and not path.exists()):
            raise UserError(f"data.source ({self.value!r}) does not exist; correct the path")
        if self.subset is not None and not self.has_subsets:
            raise UserError(
                f"data.subset ({self.subset}) is only for datasets on the Hub and folders, and data.source "
                f"({self.value}) is neither; remove data.subset"
            )

    def current_revision(self, recorded: str) -> str:
        """Return the revision of the stories as they are now; `recorded` if it is fixed or they are gone.

        Raises:
            UserError: the source cannot be read.
        """
        if self.has_revisions:
            return recorded  # a commit on the Hub does not change
        path = self.local_path()
        if path is not None and not path.exists():
            logger.warning(
                "%s no longer exists; using the stories downloaded from it earlier; for other stories, "
                "set --data.source",
                self.value,
            )
            return recorded
        return self.resolve_revision(None)

    def public_name(self) -> str:
        """Return the value without a path of this machine, for files that are published."""
        return self.value if self.local_path() is None else re.sub(r"[^:]*[/\\]", "", self.value)

    def folder_name(self) -> str | None:
        """Return the name of the folders of its data and runs; None for those of the preset."""
        return folder_names.folder_name(self.value if self.subset is None else f"{self.value}:{self.subset}")

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
    def dataset_ids(self) -> Sequence[str]:
        """Hub ids of all datasets, for the metadata of a model card."""
        return [self.dataset_id] if self.dataset_id else []

    @property
    def is_part_of_revision(self) -> bool:
        """Whether other sources with other stories have the same revision, as two files of one dataset."""
        return False

    @property
    def license(self) -> str | None:
        """License of the stories in Markdown; None if it is not known."""
        return None
