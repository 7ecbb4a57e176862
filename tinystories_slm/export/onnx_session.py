"""An exported graph in onnxruntime, and its comparison with the model."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.export.checks import (
    EquivalenceCheck,
    ExportError,
    encode_default_prompt,
    greedy_ids,
    probe_ids,
)

MAX_DIFFERENCE = 1e-4
"""Largest difference of two float32 logits: onnxruntime sums in another order, so bits can differ."""

Cache = dict[str, NDArray[np.float32]]
"""`past_key_values.N.key` and `.value`, of shape (B, H, cached tokens, D)."""


class OnnxSession:
    """A decoder with a KV cache, with the input and output names that transformers.js and optimum expect."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # the default ignores OMP_NUM_THREADS
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
        """Return the logits (B, T, V) of `input_ids` (B, T) after `cache`, and the extended cache.

        `mask` (B, S) also covers the cached tokens; it is 0 at padding.
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
        """Return the logits (B, T, V): prefill `start` tokens, then decode one at a time."""
        logits, cache = self(input_ids[:, :start], mask[:, :start])
        chunks = [logits]
        for i in range(start, input_ids.shape[1]):
            logits, cache = self(input_ids[:, i : i + 1], mask[:, : i + 1], cache)
            chunks.append(logits)
        return np.concatenate(chunks, axis=1)

    def greedy_ids(self, prompt: list[int], length: int, defaults: GenerationConfig) -> list[int]:
        """Return `prompt` and its greedy continuation, as `checks.greedy_ids` does."""
        ids = prompt[: length - 1]
        logits, cache = self(np.array([ids]), np.ones((1, len(ids)), np.int64))
        while True:
            logits[..., defaults.suppress_tokens or []] = -np.inf
            ids = [*ids, int(logits[0, -1].argmax())]
            if ids[-1] == defaults.eos_token_id or len(ids) == length:
                return ids
            logits, cache = self(np.array([ids[-1:]]), np.ones((1, len(ids)), np.int64), cache)


@torch.no_grad()
def compare_float32(
    model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase
) -> EquivalenceCheck:
    """Compare logits in one pass, logits step by step through the cache after left padding, and greedy text.

    Raises:
        ExportError: a logit differs by more than 1e-4, or the greedy text differs.
    """
    session = OnnxSession(path)
    ids = probe_ids(model, tokenizer)  # (2, T)
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    ids = ids.numpy()
    one_pass, _ = session(ids, np.ones_like(ids))

    prompt, defaults = encode_default_prompt(tokenizer), model.generation_config
    length = ids.shape[1]
    padding = length // 4
    mask = np.ones_like(ids)
    mask[0, :padding] = 0
    padded = ids.copy()
    padded[0] = np.roll(ids[0], padding)  # the ids at the padding must not matter
    stepwise = session.step_by_step(padded, mask, start=length // 2)
    difference = max(
        np.abs(one_pass - expected).max(),
        np.abs(stepwise[0, padding:] - expected[0, : length - padding]).max(),
        np.abs(stepwise[1] - expected[1]).max(),
    )
    check = EquivalenceCheck(
        name="onnx, float32",
        file=f"{path.parent.name}/{path.name}",
        max_difference=float(difference),
        greedy_match=session.greedy_ids(prompt, length, defaults) == greedy_ids(model, prompt, length),
    )
    if not check.max_difference <= MAX_DIFFERENCE or not check.greedy_match:
        raise ExportError(f"{check}; the difference must be at most {MAX_DIFFERENCE} and the story the same")
    return check


@torch.no_grad()
def compare_int8(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase) -> EquivalenceCheck:
    """Compare the logits of the model's greedy text, up to its context, fed to the graph token by token.

    The error of int8 rounding has no fixed bound, so nothing is raised; export.json records the numbers.
    """
    session = OnnxSession(path)
    prompt, context = encode_default_prompt(tokenizer), model.config.max_position_embeddings
    story = greedy_ids(model, prompt, context)
    ids = torch.tensor([story])
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    actual = session.step_by_step(ids.numpy(), np.ones((1, len(story)), np.int64), start=len(prompt))
    return EquivalenceCheck(
        name="onnx, int8",
        file=f"{path.parent.name}/{path.name}",
        max_difference=float(np.abs(actual - expected).max()),
        greedy_match=session.greedy_ids(prompt, context, model.generation_config) == story,
        token_agreement=float((actual.argmax(axis=-1) == expected.argmax(axis=-1)).mean()),
    )
