"""Fixtures of the tests of other tools: a model of each class, and its exports."""

from functools import cache
from pathlib import Path

import pytest
from conftest import FAMILIES, tiny_model
from tool_folders import TEXT, ExportFolder, Original

from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.export import ExportArgs, export
from tinystories_slm.model_folder import load_model_folder, save_model_folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> ExportFolder:
    """Return `published(family, format)`, the folder of a model whose tokenizer adds the start token."""

    @cache
    def best(family: str) -> Path:
        tokenizer = train_story_tokenizer([TEXT, "Everyone was happy."] * 5, 272)
        ids = {"pad_token_id": tokenizer.pad_token_id}
        model = tiny_model(vocab_size=len(tokenizer), intermediate_size=128, **ids, **FAMILIES[family])
        return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "best")

    @cache
    def folder(family: str, format: str) -> Path:
        if format == "best":
            return best(family)
        output = tmp_path_factory.mktemp("export") / format
        options = {"quantization": "f32"} if format == "gguf" else {}
        return export(ExportArgs(model=str(best(family)), format=format, output=output, **options))

    return folder


@pytest.fixture(scope="session")
def model_of(published: ExportFolder) -> Original:
    """Return the model of a family, which the tools' results are compared with."""
    return cache(lambda family: load_model_folder(str(published(family, "best")), device="cpu")[0])
