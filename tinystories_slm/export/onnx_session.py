"""A graph in onnxruntime, told to do what the model does."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.export.checks import Check, ExportError, greedy_ids, probe_ids, story_start

MAX_DIFFERENCE = 1e-4
"""Of two logits in float32: sums are taken in another order there, so they are not equal to the bit."""

Cache = dict[str, NDArray[np.float32]]
"""`past_key_values.N.key` and `.value` (B, H, tokens seen, D)."""


class OnnxSession:
    """A decoder with a cache, under the names that transformers.js and optimum expect."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # its own choice heeds no OMP_NUM_THREADS
        self._session = onnxruntime.InferenceSession(path, options)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._empty_cache = [
            (value.name, value.shape[1], value.shape[3])
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        ]

    def __call__(
        self, input_ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Cache | None = None
    ) -> tuple[NDArray[np.float32], Cache]:
        """Logits (B, T, V) of `input_ids` (B, T) after `cache`, and the cache with them.

        `mask` (B, S) covers the cached tokens too, and is 0 where a token is padding.
        """
        if cache is None:
            shapes = {name: (len(mask), heads, 0, size) for name, heads, size in self._empty_cache}
            cache = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, -input_ids.shape[1] :]
        feed = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, **cache}
        outputs = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
        logits = outputs.pop("logits")
        return logits, {name.replace("present", "past_key_values"): out for name, out in outputs.items()}

    def step_by_step(
        self, input_ids: NDArray[np.int64], mask: NDArray[np.int64], start: int
    ) -> NDArray[np.float32]:
        """Logits (B, T, V), the first `start` tokens at once and then one at a time, as stories are told."""
        logits, cache = self(input_ids[:, :start], mask[:, :start])
        pieces = [logits]
        for i in range(start, input_ids.shape[1]):
            logits, cache = self(input_ids[:, i : i + 1], mask[:, : i + 1], cache)
            pieces.append(logits)
        return np.concatenate(pieces, axis=1)

    def greedy_ids(self, prompt: list[int], length: int, end: int | None) -> list[int]:
        """`checks.greedy_ids` of this graph."""
        ids = prompt[: length - 1]
        logits, cache = self(np.array([ids]), np.ones((1, len(ids)), np.int64))
        while True:
            ids = [*ids, int(logits[0, -1].argmax())]
            if ids[-1] == end or len(ids) == length:
                return ids
            logits, cache = self(np.array([ids[-1:]]), np.ones((1, len(ids)), np.int64), cache)


@torch.no_grad()
def compare_float32(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Whole sequences, the same step by step through the cache behind left padding, and the greedy story.

    Raises:
        ExportError: a logit differs by more than 1e-4, or the story does.
    """
    session = OnnxSession(path)
    ids = probe_ids(model, tokenizer)  # (2, T)
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    ids = ids.numpy()
    whole, _ = session(ids, np.ones_like(ids))

    start, end = story_start(tokenizer), model.generation_config.eos_token_id
    length = ids.shape[1]
    padding = length // 4
    mask = np.ones_like(ids)
    mask[0, :padding] = 0
    padded = ids.copy()
    padded[0] = np.roll(ids[0], padding)  # what stands at the padding has no say
    stepwise = session.step_by_step(padded, mask, start=length // 2)
    difference = max(
        np.abs(whole - expected).max(),
        np.abs(stepwise[0, padding:] - expected[0, : length - padding]).max(),
        np.abs(stepwise[1] - expected[1]).max(),
    )
    check = Check(
        name="onnx, float32",
        file=f"{path.parent.name}/{path.name}",
        max_difference=float(difference),
        same_text=session.greedy_ids(start, length, end) == greedy_ids(model, start, length),
    )
    if not check.max_difference <= MAX_DIFFERENCE or not check.same_text:
        raise ExportError(f"{check}; at most {MAX_DIFFERENCE} and the same story are allowed")
    return check


@torch.no_grad()
def compare_int8(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase) -> Check:
    """The model's greedy story, up to its context, given to the graph token by token.

    Rounding costs what it costs, so nothing is raised; the figures go into the record.
    """
    session = OnnxSession(path)
    start, context = story_start(tokenizer), model.config.max_position_embeddings
    story = greedy_ids(model, start, context)
    ids = torch.tensor([story])
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    got = session.step_by_step(ids.numpy(), np.ones((1, len(story)), np.int64), start=len(start))
    return Check(
        name="onnx, int8",
        file=f"{path.parent.name}/{path.name}",
        max_difference=float(np.abs(got - expected).max()),
        same_text=session.greedy_ids(start, context, model.generation_config.eos_token_id) == story,
        agreement=float((got.argmax(axis=-1) == expected.argmax(axis=-1)).mean()),
    )
