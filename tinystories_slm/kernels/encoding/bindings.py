"""Byte-level BPE in C for the tokenizers that it fits; ids are those of the tokenizer.

And the counts of distinct chunks of text, from which a vocabulary is trained.
"""

import ctypes
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinystories_slm.kernels.build import compile_library

_SOURCE = Path(__file__).with_name("kernels.c")
_MODEL_SETTINGS = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


class BytePairEncoder:
    """Vocabulary and merges of a byte-level BPE, and the pieces that were encoded so far.

    Not for several threads at once: each has its own encoder.
    """

    def __init__(self, library: ctypes.CDLL, model: Mapping[str, Any]) -> None:
        self._library = library
        vocabulary = model["vocab"]
        letters = byte_letters()
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        arrays = [
            np.array([vocabulary[letters[byte]] for byte in range(256)], dtype=np.int32),
            np.array([vocabulary[left] for left, _ in pairs], dtype=np.int32),
            np.array([vocabulary[right] for _, right in pairs], dtype=np.int32),
            np.array([vocabulary[left + right] for left, right in pairs], dtype=np.int32),
        ]
        self._encoder = library.new_encoder(*(array.ctypes.data for array in arrays), len(pairs))
        if not self._encoder:
            raise MemoryError("no memory for the vocabulary")

    def __del__(self) -> None:
        if getattr(self, "_encoder", None):
            self._library.free_encoder(self._encoder)

    def encode(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode texts of ASCII characters; other ones, and those with a very long word, are left out.

        Args:
            data: UTF-8 bytes of all texts, uint8 (num_bytes,).
            offsets: Start of each text and end of the last one, int64 (num_texts + 1,).

        Returns:
            Ids of all texts, int32 (num_ids,); the end of each text in them, int64 (num_texts,); and whether
            a text was left out, bool (num_texts,).
        """
        num_texts = len(offsets) - 1
        ids = np.empty(int(offsets[-1] - offsets[0]), dtype=np.int32)
        ends = np.zeros(num_texts, dtype=np.int64)
        is_left = np.zeros(num_texts, dtype=np.uint8)
        arrays = (ids, ends, is_left)
        self._library.encode(
            self._encoder, data.ctypes.data, offsets.ctypes.data, num_texts, *(a.ctypes.data for a in arrays)
        )
        return ids[: ends[-1] if num_texts else 0], ends, is_left.astype(bool)


class ChunkCounter:
    """Counts of the distinct chunks of texts: words with the blank before them, and white space.

    GPT-2's pre-tokenization of a text is that of its chunks, one after another. Memory grows with the number
    of distinct chunks.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._counter = library.new_counter()
        if not self._counter:
            raise MemoryError("no memory to count words")

    def __del__(self) -> None:
        if getattr(self, "_counter", None):
            self._library.free_counter(self._counter)

    def add(self, texts: Sequence[str]) -> None:
        """Count the chunks of all `texts`, together less than 2 GiB."""
        encoded = [text.encode() for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        data = np.frombuffer(b"".join(encoded) or b"\0", dtype=np.uint8)
        if not self._library.count_chunks(self._counter, data.ctypes.data, offsets.ctypes.data, len(encoded)):
            raise MemoryError("no memory to count words")

    def counts(self) -> dict[str, int]:
        """Return the count of each distinct chunk."""
        data = np.empty(self._library.num_chunk_bytes(self._counter), dtype=np.uint8)
        arrays = [np.empty(self._library.num_chunks(self._counter), dtype=np.int64) for _ in range(3)]
        if not len(data):
            return {}
        self._library.read_chunks(self._counter, data.ctypes.data, *(array.ctypes.data for array in arrays))
        text, (starts, ends, counts) = data.tobytes(), (array.tolist() for array in arrays)
        return {
            text[start:end].decode(): count for start, end, count in zip(starts, ends, counts, strict=True)
        }


def load_counter() -> ChunkCounter | None:
    """Return an empty counter; None without a C compiler."""
    library = _load_library()
    return None if library is None else ChunkCounter(library)


def load_encoder(tokenizer_json: str) -> BytePairEncoder | None:
    """Return an encoder for the tokenizer that the text of a tokenizer.json describes.

    None if it is not a byte-level BPE with GPT-2's pre-tokenization, or without a C compiler.
    """
    tokenizer = json.loads(tokenizer_json)
    if not _is_supported(tokenizer):
        return None
    library = _load_library()
    return None if library is None else BytePairEncoder(library, tokenizer["model"])


def _is_supported(tokenizer: Mapping[str, Any]) -> bool:
    model, pre_tokenizer = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    return (
        all((model.get(name) or value) == value for name, value in _MODEL_SETTINGS.items())
        and all(pre_tokenizer.get(name) == value for name, value in _PRE_TOKENIZER.items())
        and tokenizer["normalizer"] is None
        # Special tokens are plain text within a story; other added ones are not.
        and all(token["special"] for token in tokenizer["added_tokens"])
        and set(byte_letters().values()) <= model["vocab"].keys()
    )


@cache
def byte_letters() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary, as in GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


@cache
def _load_library() -> ctypes.CDLL | None:
    library = compile_library(_SOURCE, torch.float32, math_flags=())
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.new_encoder.argtypes = [pointer, pointer, pointer, pointer, integer]
        library.new_encoder.restype = pointer
        library.free_encoder.argtypes = [pointer]
        library.free_encoder.restype = None
        library.encode.argtypes = [pointer, pointer, pointer, integer, pointer, pointer, pointer]
        library.encode.restype = None
        library.new_counter.argtypes = []
        library.new_counter.restype = pointer
        library.free_counter.argtypes = [pointer]
        library.free_counter.restype = None
        library.count_chunks.argtypes = [pointer, pointer, pointer, integer]
        library.count_chunks.restype = ctypes.c_int
        library.num_chunks.argtypes = [pointer]
        library.num_chunks.restype = integer
        library.num_chunk_bytes.argtypes = [pointer]
        library.num_chunk_bytes.restype = integer
        library.read_chunks.argtypes = [pointer, pointer, pointer, pointer, pointer]
        library.read_chunks.restype = None
    return library
