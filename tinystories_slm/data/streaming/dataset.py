"""Training windows of a stream, chunk by chunk: each chunk is packed as a token file is."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tinystories_slm.config import DataArgs
from tinystories_slm.data.packing import Batch, PackedDataset, WindowSource, packing_class
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.streaming.chunks import Chunk, ChunkReader
from tinystories_slm.data.streaming.read_ahead import ReadAhead
from tinystories_slm.data.streaming.stories import StreamPosition
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.errors import UserError

Result = TypeVar("Result")
Share = Callable[[Callable[[], Result]], Result]
"""Calls a function on the main process and returns its result on every process."""


class StreamError(UserError):
    """The stream cannot be read further; the state of the run is that of the last complete step."""


class _OpenChunk(NamedTuple):
    number: int
    """Number of chunks before it, of all epochs: it takes the place of the epoch in the order."""
    first: int
    """Number of windows before it."""
    windows: PackedDataset
    chunk: Chunk

    @property
    def end(self) -> int:
        return self.first + len(self.windows)


class StreamedDataset(WindowSource):
    """Endless windows of a stream of stories.

    The windows of a chunk come in an order that is a function of (seed, number of the chunk); the chunks
    follow one another. An epoch of one chunk has the batches of a token file. One process reads the stream,
    one chunk ahead, and every process gets each chunk, so that the number of processes changes nothing.
    """

    def __init__(
        self,
        reader: ChunkReader,
        pack: Callable[[Chunk], PackedDataset],
        *,
        share: Share = lambda make: make(),
        position: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            reader: Reader of the chunks.
            pack: Returns the windows of a chunk.
            share: Distribution of a chunk to all processes.
            position: Result of `stream_position`; null for the start of the stream.
        """
        start = position or {"chunk": 0, "first_window": 0, "stories": StreamPosition().to_dict()}
        self._next_number, self._next_first = start["chunk"], start["first_window"]
        self._next_position = StreamPosition.from_dict(start["stories"])
        self._reader, self._pack, self._share = reader, pack, share
        self._read_ahead = ReadAhead(reader.iter_chunks(self._next_position))
        self._chunks: deque[_OpenChunk] = deque()

    def batch(self, step: int, batch_size: int, *, rows: slice = slice(None)) -> Batch:
        """Return the sequences of optimizer step `step`; steps must not decrease.

        Every process must call this for each step: the chunks are distributed when the first row of the
        batch of all processes needs them.

        Raises:
            StreamError: the stories cannot be read, on every process.
        """
        numbers = step * batch_size + np.arange(batch_size)
        while self._next_first <= numbers[-1]:
            self._load(keep_from=int(numbers[0]))
        while self._chunks[0].end <= numbers[0]:
            self._chunks.popleft()
        wanted = numbers[rows]
        found = []
        for one in self._chunks:
            inside = wanted[(wanted >= one.first) & (wanted < one.end)]
            if len(inside):
                found.append(one.windows.sequences(np.full(len(inside), one.number), inside - one.first))
        return _concatenate(found)

    def stream_position(self, step: int, batch_size: int) -> dict[str, Any]:
        first = step * batch_size
        for one in self._chunks:
            if one.first <= first < one.end:
                return _position(one.number, one.first, one.chunk.start)
        return _position(self._next_number, self._next_first, self._next_position)

    @property
    def num_stories_read(self) -> int:
        """Training stories of all epochs in the chunks so far."""
        return self._next_position.num_stories

    def close(self) -> None:
        self._reader.is_stopped.set()
        self._read_ahead.close()
        self._chunks.clear()

    def _load(self, keep_from: int) -> None:
        """Open the next chunk; first drop those that end before window `keep_from`."""
        chunk = self._share(self._take)
        if isinstance(chunk, str):
            raise StreamError(chunk)
        while self._chunks and self._chunks[0].end <= keep_from:
            self._chunks.popleft()
        opened = _OpenChunk(self._next_number, self._next_first, self._pack(chunk), chunk)
        self._chunks.append(opened)
        self._next_number, self._next_first = opened.number + 1, opened.end
        self._next_position = chunk.end

    def _take(self) -> Chunk | str:
        """Return the next chunk, or the message of the error that ends the stream."""
        try:
            return self._read_ahead.take()
        except UserError as error:
            return str(error)


def open_stream(
    data: DataArgs,
    manifest: Manifest,
    *,
    seed: int,
    share: Share = lambda make: make(),
    position: dict[str, Any] | None = None,
) -> StreamedDataset:
    """Return the training windows of a source that is not on this disk.

    Args:
        data: Source, packing and size of a chunk.
        manifest: Manifest of the sample in `data.data_dir`: revision, cleaning rules, type of an id.
        seed: Seed of the order of the windows in a chunk.
        share: As of `StreamedDataset`.
        position: As of `StreamedDataset`.
    """
    make = partial(
        packing_class(data.packing),
        seq_len=data.seq_len,
        seed=seed,
        eos_token_id=manifest.eos_token_id,
        mask_across_stories=data.mask_across_stories,
    )

    def pack(chunk: Chunk) -> PackedDataset:
        return make(chunk.ids, prompt_lengths=chunk.prompt_lengths if data.loss_on == "story" else None)

    # A tokenizer of its own: the thread of the reader uses it.
    encoder = StoryEncoder(load_tokenizer(data.data_dir / "tokenizer"))
    reader = ChunkReader(data, manifest.provenance, encoder, manifest.token_dtype)
    return StreamedDataset(reader, pack, share=share, position=position)


def _position(number: int, first_window: int, stories: StreamPosition) -> dict[str, Any]:
    return {"chunk": number, "first_window": first_window, "stories": stories.to_dict()}


def _concatenate(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    input_ids = np.concatenate([batch.input_ids for batch in batches])
    has_own_labels = any(batch.labels is not batch.input_ids for batch in batches)
    has_positions = batches[0].position_ids is not None
    return Batch(
        input_ids,
        np.concatenate([batch.labels for batch in batches]) if has_own_labels else input_ids,
        np.concatenate([batch.position_ids for batch in batches]) if has_positions else None,
    )
