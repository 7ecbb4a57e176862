"""Reader of llama2.c's version 0 files in numpy, which computes what its program `run` computes."""

import struct
from collections.abc import Collection, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinystories_slm.export.checks import ExportError

MODEL = "model.bin"
TOKENIZER = "tokenizer.bin"
HEADER = struct.Struct("<7i")
"""hidden, feed-forward, layers, heads, key-value heads, vocabulary (negative: own output head), context."""
BOS = 1
"""Id that `run` writes before each text and stops at."""
FIRST_BYTE = 3
"""Id of byte 0 in `run`."""

Array = NDArray[np.float32]


class Llama2cReader:
    """The model and the tokenizer of a folder, with the ids of `run`.

    Raises:
        ExportError: model.bin has another length than its header states.
    """

    def __init__(self, folder: Path) -> None:
        self.texts, self._scores = _read_tokenizer(folder / TOKENIZER)
        self._id_of = {text: id_ for id_, text in enumerate(self.texts)}
        data = (folder / MODEL).read_bytes()
        hidden, mlp, layers, heads, kv_heads, vocab, context = HEADER.unpack_from(data)
        size = hidden // heads
        self._heads, self._kv_heads, self._size = heads, kv_heads, size
        shapes = {
            "embedding": (abs(vocab), hidden),
            "attention_norm": (layers, hidden),
            "query": (layers, hidden, hidden),
            "key": (layers, kv_heads * size, hidden),
            "value": (layers, kv_heads * size, hidden),
            "output": (layers, hidden, hidden),
            "mlp_norm": (layers, hidden),
            "gate": (layers, mlp, hidden),
            "down": (layers, hidden, mlp),
            "up": (layers, mlp, hidden),
            "norm": (hidden,),
            "cosines": (context, size // 2),
            "sines": (context, size // 2),
        } | ({"head": (-vocab, hidden)} if vocab < 0 else {})
        ends = np.cumsum([prod(shape) for shape in shapes.values()])
        numbers = np.frombuffer(data, "<f4", offset=HEADER.size)
        if len(numbers) != ends[-1]:
            raise ExportError(f"{MODEL}: {len(numbers)} numbers, but its header states {ends[-1]}")
        parts = np.split(numbers, ends[:-1])
        self._weights = {
            name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        self._weights.setdefault("head", self._weights["embedding"])

    def logits(self, ids: Sequence[int]) -> Array:
        """Return the logits (T, V) after each of `ids`, computed one token at a time."""
        cache: list[list[tuple[Array, Array]]] = [[] for _ in self._weights["query"]]
        return np.stack([self._step(id_, position, cache) for position, id_ in enumerate(ids)])

    def greedy_ids(self, prompt: Sequence[int], length: int, suppressed: Collection[int] = ()) -> list[int]:
        """Return `prompt` and its greedy continuation, at most `length` ids, up to `BOS`."""
        cache: list[list[tuple[Array, Array]]] = [[] for _ in self._weights["query"]]
        ids = list(prompt[: length - 1])
        for position in range(length - 1):
            logits = self._step(ids[position], position, cache)
            if position == len(ids) - 1:
                logits[list(suppressed)] = -np.inf
                ids.append(int(logits.argmax()))
                if ids[-1] == BOS:
                    break
        return ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` after the start that `run` adds: `BOS` and a blank.

        Characters become tokens, or their bytes; then the pair with the highest score is merged, the first
        one of equals, until no joint text of a pair is a token.
        """
        ids = [BOS]
        for character in (" " if text else "") + text:
            piece = character.encode("utf-8")
            ids += [self._id_of[piece]] if piece in self._id_of else [FIRST_BYTE + byte for byte in piece]
        while True:
            joint = [self._id_of.get(self.texts[left] + self.texts[right]) for left, right in pairwise(ids)]
            merged = [(self._scores[id_], -at, id_) for at, id_ in enumerate(joint) if id_ is not None]
            if not merged:
                return ids
            _, at, id_ = max(merged)
            ids[-at : -at + 2] = [id_]

    def _step(self, id_: int, position: int, cache: list[list[tuple[Array, Array]]]) -> Array:
        """Return the logits (V,) after token `id_`, whose keys and values are appended to `cache`."""
        weights = self._weights
        x = weights["embedding"][id_]  # (C,)
        for layer, seen in enumerate(cache):
            normed = _rms_norm(x, weights["attention_norm"][layer])
            query = self._rotate(weights["query"][layer] @ normed, position)  # (H, D)
            key = self._rotate(weights["key"][layer] @ normed, position)  # (K, D)
            seen.append((key, (weights["value"][layer] @ normed).reshape(self._kv_heads, -1)))
            keys, values = (np.stack(each, axis=1) for each in zip(*seen, strict=True))  # (K, T, D)
            group = self._heads // self._kv_heads
            attended = _attend(query, keys.repeat(group, axis=0), values.repeat(group, axis=0))
            x = x + weights["output"][layer] @ attended.reshape(-1)
            normed = _rms_norm(x, weights["mlp_norm"][layer])
            gate = weights["gate"][layer] @ normed
            x = x + weights["down"][layer] @ (gate / (1 + np.exp(-gate)) * (weights["up"][layer] @ normed))
        return weights["head"] @ _rms_norm(x, weights["norm"])

    def _rotate(self, x: Array, position: int) -> Array:
        """Rotate each pair (x[2i], x[2i + 1]) of each head; returns (heads, D)."""
        exponents = np.arange(0, self._size, 2, dtype=np.float32) / np.float32(self._size)
        angles = np.float32(position) / np.float32(10_000.0) ** exponents
        even, odd = x.reshape(-1, self._size // 2, 2).transpose(2, 0, 1)
        rotated = (even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles))
        return np.stack(rotated, axis=-1).reshape(-1, self._size)


def _read_tokenizer(path: Path) -> tuple[list[bytes], list[float]]:
    data, offset = path.read_bytes(), 4  # after the length of the longest text
    texts, scores = [], []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8 + length
        texts.append(data[offset - length : offset])
        scores.append(score)
    return texts, scores


def _rms_norm(x: Array, weight: Array) -> Array:
    return weight * (x / np.sqrt(np.mean(x * x) + np.float32(1e-5)))


def _attend(query: Array, keys: Array, values: Array) -> Array:
    """Return the attention output (H, D) of `query` (H, D) over `keys` and `values` (H, T, D)."""
    scores = np.einsum("hd,htd->ht", query, keys) / np.sqrt(np.float32(query.shape[-1]))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("ht,htd->hd", weights / weights.sum(axis=-1, keepdims=True), values)
