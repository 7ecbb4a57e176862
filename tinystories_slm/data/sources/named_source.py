"""The named sets as sources: selected files of a Hub dataset at a pinned commit."""

from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice

from tinystories_slm.data.sources import hub, local
from tinystories_slm.data.sources.file_formats import read_archive
from tinystories_slm.data.sources.hub_files import remote_path
from tinystories_slm.data.sources.named_sets import NAMED_SETS, NamedSet, StoryFiles
from tinystories_slm.data.sources.selection import match_paths, matches_any
from tinystories_slm.data.sources.separators import log_separators
from tinystories_slm.data.sources.story_source import FileSequence, Splits, StorySource
from tinystories_slm.errors import UserError


class NamedSource(StorySource):
    """An entry of `NAMED_SETS`; its revision is a commit of the dataset.

    `data.text_column` of `text`, the default, stands for the column of the set.
    """

    has_revisions = True
    needs_network = True
    is_filtered_by_default = True

    @classmethod
    def matches(cls, value: str) -> bool:
        return value in NAMED_SETS

    @classmethod
    def matches_record(cls, value: str, revision: str) -> bool:
        return value in NAMED_SETS and hub.is_commit(revision)

    def resolve_revision(self, requested: str | None) -> str:
        return hub.resolve_dataset_commit(self._set.repository, requested or self._set.revision)

    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
        commit = self.resolve_revision(revision)
        column = self._set.text_column if text_column == "text" else text_column
        return {
            name: self._open_split(files, commit, column)
            if self.is_streamed and not files.selects_rows
            else partial(self._read, files, commit, column)
            for name, files in self._set.splits.items()
        }

    def num_download_bytes(self, revision: str | None, splits: Collection[str]) -> int:
        sizes = hub.list_files(self._set.repository, revision or self._set.revision)
        files = {path for name in splits if name in self._set.splits for path in self._match(name, sizes)}
        return sum(sizes[path] for path in files)

    def folder_name(self) -> str:
        return self.value

    @property
    def dataset_id(self) -> str:
        return self._set.repository

    @property
    def label(self) -> str:
        return f"{self.value} ({self._set.repository})"

    @property
    def license(self) -> str | None:
        return self._set.license

    @property
    def is_part_of_revision(self) -> bool:
        return not self._set.is_whole_dataset

    @property
    def _set(self) -> NamedSet:
        return NAMED_SETS[self.value]

    def _match(self, split: str, paths: Collection[str]) -> list[str]:
        return [path for pattern in self._set.splits[split].files for path in match_paths(paths, pattern)]

    def _read(self, files: StoryFiles, commit: str, column: str) -> Iterator[str | None]:
        return islice(self._open_split(files, commit, column)(), files.first_row, files.end_row)

    def _open_split(self, files: StoryFiles, commit: str, column: str) -> FileSequence:
        repository = self._set.repository
        sizes = hub.list_files(repository, commit)
        found = []
        for pattern in files.files:
            if not (matches := match_paths(sizes, pattern)):
                raise UserError(
                    f"data.source ({self.value}): {repository} at {commit} has no file {pattern}; "
                    "remove data.revision, or set it to a commit with this file"
                )
            found += matches
        return FileSequence([partial(self._read_file, files, commit, file, column) for file in found])

    def _read_file(self, files: StoryFiles, commit: str, file: str, column: str) -> Iterator[str | None]:
        locate = remote_path if self.is_streamed else hub.download_file
        path = locate(self._set.repository, commit, file)
        if not files.members:
            return local.read_story_file(path, self.value, column)
        return log_separators(read_archive(path, partial(matches_any, files.members), column), self.value)
