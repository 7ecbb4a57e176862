"""Shared by the tests of other tools: the forms of a tiny model, and what a tool passes to load each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tinystories_slm.model import TinyStoriesForCausalLM

INSTALL = "pip install 'tinystories_slm[research]'"
TEXT = "Once upon a time, there was a little fox."
MAX_DIFFERENCE = 1e-5  # measured: 3e-6
CLASSES = ["gpt2", "llama", "llama, qk_norm, untied"]
FORMATS = ["custom", "native", "gguf"]

every_family = pytest.mark.parametrize("family", CLASSES)
every_format = pytest.mark.parametrize("format", FORMATS)

ExportFolder = Callable[[str, str], Path]
Original = Callable[[str], TinyStoriesForCausalLM]


def loading_options(format: str) -> dict[str, object]:
    """Return what `from_pretrained` and most tools take to load a folder of `format`."""
    return {"custom": {"trust_remote_code": True}, "native": {}, "gguf": {"gguf_file": "model.gguf"}}[format]


def load(folder: Path, format: str, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **loading_options(format), **options).eval()


def text_ids(folder: Path) -> torch.Tensor:
    """Return the ids of `TEXT` with its start token, (1, T)."""
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXT, return_tensors="pt").input_ids
    assert ids[0, 0] == 0 and ids[0, 1] != 0
    return ids


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < MAX_DIFFERENCE
