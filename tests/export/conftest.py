"""Fixtures of the export tests: a small vocabulary, a model folder per family, each export written once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data.sources.file_formats import END_OF_TEXT
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.export import ExportArgs, export
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, save_model_folder

VOCAB_SIZE = 288
STORIES = (
    "Once upon a time, there was a little fox. He lived in a hole with his mom.",
    "Lily's cat said: \"Don't go!\" 3 times. Then it went home, and everyone was happy.",
)

ExportFolder = Callable[..., Path]
"""`exported(family, format, **options)` returns the folder of that export."""


@pytest.fixture
def story_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 288 entries: the end token, 256 bytes and 31 merges."""
    return _story_tokenizer()


def _story_tokenizer() -> PreTrainedTokenizerFast:
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe(STORIES * 5, VOCAB_SIZE), **special)


@pytest.fixture(scope="session")
def best(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of an untrained model of each of `FAMILIES`, with few default settings."""

    @cache
    def make(family: str) -> Path:
        overrides = dict(FAMILIES[family])
        if overrides["family"] == "llama":
            overrides["rope_theta"] = 50_000.0
        # Rows of 48 do not divide into Q8_0's blocks of 32, and 48 is not the 4 x 32 that GPT-2 assumes.
        model = tiny_model(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48 if "bias" in overrides else 128,
            **overrides,
        )
        return save_model_folder(model, _story_tokenizer(), tmp_path_factory.mktemp("run") / "best")

    return make


@pytest.fixture(scope="session")
def exported(best: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> ExportFolder:
    @cache
    def make(family: str, format: str, **options: str) -> Path:
        output = tmp_path_factory.mktemp("export") / format
        return export(ExportArgs(model=str(best(family)), format=format, output=output, **options))

    return make


@pytest.fixture(scope="session")
def original(best: Callable[[str], Path]) -> Callable[[str], TinyStoriesForCausalLM]:
    """Return the float32 model that the exports of a family are compared with."""
    return cache(lambda family: load_model_folder(str(best(family)), device="cpu")[0])


@pytest.fixture(scope="session")
def input_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(1))
