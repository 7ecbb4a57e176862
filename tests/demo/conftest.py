"""Two small models that write words, and the page that shows them."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from demo_client import CONTEXT
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.data.sources.file_formats import END_OF_TEXT
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.demo.live_stories import StoryModel
from tinystories_slm.grammar import generate_corpus
from tinystories_slm.model_folder import save_model_folder


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> PreTrainedModel:
    """Train on the starts of `stories` until the model writes words."""
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end, *tokenizer(story).input_ids[: CONTEXT - 2]] for story in stories])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=4e-3)
    for _ in range(40):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(list(generate_corpus(100, seed=1)), 500), **special
    )


@pytest.fixture(scope="session")
def tales(tokenizer) -> StoryModel:
    """A model of this project."""
    stories = list(generate_corpus(12, seed=2))
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "max_position_embeddings": CONTEXT}
    return StoryModel("tales", fit(tiny_model(scale=1.0, **sizes), tokenizer, stories), tokenizer)


@pytest.fixture(scope="session")
def other(tokenizer) -> StoryModel:
    """A model of transformers."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer), "n_embd": 48, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT}
    config = GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    stories = list(generate_corpus(12, seed=3))
    return StoryModel("other", fit(GPT2LMHeadModel(config), tokenizer, stories), tokenizer)


@pytest.fixture(scope="session")
def tales_folder(tales, tmp_path_factory) -> Path:
    return save_model_folder(tales.model, tales.tokenizer, tmp_path_factory.mktemp("run") / "best")


@pytest.fixture(scope="module")
def contacted() -> Iterator[set[str]]:
    """Hosts that this process connects to."""
    hosts: set[str] = set()
    connect = socket.socket.connect

    def record(self, address):
        if isinstance(address, tuple):
            hosts.add(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", record)
        yield hosts


@contextmanager
def served_page(models: list[StoryModel], *, report_cards=(), **options) -> Iterator[str]:
    """Serve the page of `models` in this process; yield its address."""
    pytest.importorskip("gradio", reason="needs the extra demo")
    from tinystories_slm.demo.page import build_page, launch_page

    args = DemoArgs(model=[one.name for one in models], **options)
    page = build_page(models, args, report_cards)
    try:
        yield launch_page(page, args)
    finally:
        page.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """A function that serves models until the test ends, and returns the address."""
    with ExitStack() as stack:
        yield lambda models, **options: stack.enter_context(served_page(models, **options))
