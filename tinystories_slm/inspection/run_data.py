"""The training windows of a run: which stories a step read, and which steps read a story."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from tinystories_slm.config import RunConfig
from tinystories_slm.data.packing import IGNORED_LABEL, ORDER_VERSION, PADDING, Batch, PackedDataset
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.data.training_windows import open_windows
from tinystories_slm.errors import UserError
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.checkpoints import (
    check_same_data,
    checkpoint_step,
    latest_valid_checkpoint,
    read_progress,
)

# Sequences whose positions are in memory at the same time.
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class StoryPart:
    """Consecutive tokens of one story in a window."""

    story: int
    """Row of the story in raw/train.parquet, from 0."""
    first_token: int
    """First of these tokens in the story, from 0."""
    num_tokens: int
    """Number of these tokens; the end-of-text token is the last one of a story."""
    story_tokens: int
    """Tokens of the whole story, with its end-of-text token."""
    column: int
    """Column of the first of these tokens in the window."""
    num_predicted: int
    """Number of these tokens that the step predicted; the others were context only."""

    @property
    def has_text(self) -> bool:
        """Whether the part has more than the end-of-text token."""
        return self.first_token < self.story_tokens - 1


@dataclass(frozen=True)
class RunData:
    """The prepared data of a run, and the order in which the run reads them."""

    config: RunConfig
    dataset: PackedDataset
    tokenizer: PreTrainedTokenizerBase
    num_steps: int
    """Number of finished optimizer steps."""

    @classmethod
    def open(cls, path: Path) -> "RunData":
        """Open the data of the run directory `path`; nothing is prepared or changed.

        Raises:
            UserError: it is no run directory, or its data are streamed, missing or other ones by now.
        """
        run_dir = RunDir(path)
        config = run_dir.load_config()
        if config is None:
            raise UserError(f"run ({path}): must be a run directory with a config.yaml; correct the path")
        if config.data.streaming:
            raise UserError(
                f"run ({path}): its stories were streamed (data.streaming), and the order of a stream is not "
                "recorded here; inspect a run on prepared data"
            )
        record = config.data.data_dir / "manifest.json"
        if not record.is_file():
            raise UserError(
                f"data.data_dir ({config.data.data_dir}): must hold the data of the run; prepare them with "
                f"prepare_data --config {run_dir.config}"
            )
        manifest = Manifest.load(record)
        check_same_data(manifest, path)
        return cls(
            config=config,
            dataset=open_windows(config, manifest),
            tokenizer=load_tokenizer(config.data.data_dir / "tokenizer"),
            num_steps=_num_finished_steps(path),
        )

    @property
    def batch_size(self) -> int:
        return self.config.train.batch_size

    def batch(self, step: int) -> Batch:
        """Return the windows that optimizer step `step`, from 1, read, over all processes.

        Raises:
            UserError: the run has no such step.
        """
        if not 1 <= step <= self.num_steps:
            raise UserError(f"step ({step}): must be between 1 and {self.num_steps}, the steps of the run")
        return self.dataset.batch(step - 1, self.batch_size)

    def parts(self, step: int) -> list[list[StoryPart]]:
        """Return the parts of stories, without excluded ones, in each window of step `step`, from 1."""
        rows = (step - 1) * self.batch_size + np.arange(self.batch_size)
        positions, labels = self.dataset.positions(rows), self.batch(step).labels
        return [self._parts_of(*row) for row in zip(positions, labels, strict=True)]

    def _parts_of(self, positions: np.ndarray, labels: np.ndarray) -> list[StoryPart]:
        """Return the parts of the window with these token positions and labels, (seq_len,) each."""
        ends = self.dataset.document_ends
        is_hidden = (positions == PADDING) | self.dataset.is_excluded(positions)
        story = np.where(is_hidden, -1, np.searchsorted(ends, positions))
        is_new = np.concatenate([[True], (np.diff(story) != 0) | (np.diff(positions) != 1)])
        is_predicted = labels != IGNORED_LABEL
        is_predicted[0] = False  # labels are shifted: nothing precedes the first token
        columns = np.flatnonzero(is_new)
        parts = []
        for column, stop in zip(columns.tolist(), [*columns[1:].tolist(), len(story)], strict=True):
            index = int(story[column])
            if index in (-1, len(ends)):  # padding, excluded, or an incomplete story at the end
                continue
            first = int(ends[index - 1]) + 1 if index else 0
            parts.append(
                StoryPart(
                    story=index,
                    first_token=int(positions[column]) - first,
                    num_tokens=stop - column,
                    story_tokens=int(ends[index]) + 1 - first,
                    column=column,
                    num_predicted=int(is_predicted[column:stop].sum()),
                )
            )
        return parts

    def reads_of(self, stories: np.ndarray) -> Iterator[tuple[int, int, StoryPart]]:
        """Yield (step from 1, row, part) for each time that a step read text of one of `stories`, in order.

        All windows of the run are computed; the time is that of reading the token positions of the run once.

        Args:
            stories: Rows of raw/train.parquet, int64 (n,).
        """
        ends = self.dataset.document_ends
        is_wanted = np.zeros(len(ends) + 1, dtype=bool)
        is_wanted[stories] = True
        num_rows = self.num_steps * self.batch_size
        for start in range(0, num_rows, _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, num_rows))
            positions = self.dataset.positions(rows)
            found = (is_wanted[np.searchsorted(ends, positions)] & (positions != PADDING)).any(axis=1)
            for step, of_step in groupby(rows[found].tolist(), key=lambda row: row // self.batch_size + 1):
                parts = self.parts(step)
                for row in of_step:
                    in_batch = row % self.batch_size
                    wanted = (part for part in parts[in_batch] if is_wanted[part.story] and part.has_text)
                    yield from ((step, in_batch, part) for part in wanted)


def _num_finished_steps(path: Path) -> int:
    """Return the number of finished steps of a run, that of its newest checkpoint.

    Raises:
        UserError: there is no checkpoint, or the windows of the run had another order than this version has.
    """
    newest = latest_valid_checkpoint(path)
    if newest is None:
        raise UserError(f"run ({path}): must have a checkpoint; use the directory of a run that saved one")
    version = read_progress(newest).window_order
    if version != ORDER_VERSION:
        raise UserError(
            f"run ({path}): another version of this package ordered its windows (order {version}, here "
            f"{ORDER_VERSION}); use that version"
        )
    return checkpoint_step(newest)
