"""Token ids of a stream, in chunks of bounded size."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import Event

import numpy as np
import pyarrow as pa

from tinystories_slm.config import DataArgs
from tinystories_slm.data.provenance import Provenance
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.streaming.stories import StoryStream, StreamPosition, open_training_splits
from tinystories_slm.errors import UserError

# Texts that are in memory at the same time; more do not make the encoder faster.
_BATCH_STORIES = 1024
_BATCH_CHARACTERS = 2**21


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Whole stories of one epoch."""

    ids: np.ndarray
    """Token ids, each story followed by the end-of-text id, (num_ids,)."""
    prompt_lengths: np.ndarray
    """Number of ids before the story of each block, uint32 (num_stories,)."""
    start: StreamPosition
    end: StreamPosition


class ChunkReader:
    """Reader of the chunks of a stream, which the stories and `data.streaming_chunk_tokens` determine."""

    def __init__(
        self, data: DataArgs, provenance: Provenance, encoder: StoryEncoder, token_dtype: str
    ) -> None:
        self._data = data
        self._provenance = provenance
        self._encoder = encoder
        self._dtype = np.dtype(token_dtype)
        self.is_stopped = Event()
        """Ends `iter_chunks`, from any thread."""

    def iter_chunks(self, start: StreamPosition) -> Iterator[Chunk]:
        """Yield chunks without end; the last chunk of an epoch may be short.

        Raises:
            UserError: the source cannot be read, or has no training story.
        """
        splits = open_training_splits(self._data, self._provenance.revision)
        while not self.is_stopped.is_set():
            stream = StoryStream(splits, self._data, self._provenance.cleaning, start)
            # A small chunk is exceeded by few stories.
            batches = _iter_batches(stream, min(_BATCH_CHARACTERS, self._data.streaming_chunk_tokens))
            while (read := self._read_chunk(batches)) is not None:
                ids, prompt_lengths = read
                end = stream.position()
                yield Chunk(ids=ids, prompt_lengths=prompt_lengths, start=start, end=end)
                start = end
            if start.num_read == 0 and not self.is_stopped.is_set():
                name = find_source(self._data.source, self._data.subset).value
                raise UserError(f"data.source ({name}) has no training stories; use another source")
            start = start.next_epoch()

    def _read_chunk(self, batches: Iterable[list[str]]) -> tuple[np.ndarray, np.ndarray] | None:
        """Return ids and prompt lengths of the next stories; None at the end of the epoch."""
        ids, prompt_lengths, num_ids = [], [], 0
        for batch in batches:
            if self.is_stopped.is_set():
                return None
            stories = pa.array(batch, pa.large_string())
            ids.append(self._encoder.encode(stories).astype(self._dtype))
            prompt_lengths.append(self._encoder.prompt_lengths(stories))
            num_ids += len(ids[-1])
            if num_ids >= self._data.streaming_chunk_tokens:
                break
        return (np.concatenate(ids), np.concatenate(prompt_lengths)) if ids else None


def _iter_batches(stories: Iterable[str], max_characters: int) -> Iterator[list[str]]:
    """Yield lists of stories that are encoded at once."""
    batch: list[str] = []
    num_characters = 0
    for story in stories:
        batch.append(story)
        num_characters += len(story)
        if len(batch) == _BATCH_STORIES or num_characters >= max_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
