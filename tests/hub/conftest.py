"""A finished run with every file that a run can have, and a local Hub to push it to."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub.loopback import LoopbackHub
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tinystories_slm.config import parse_config
from tinystories_slm.training import train

TOKEN = "hf_tester_may_write"

EVALUATION = {
    "loss": 1.23456,
    "perplexity": 3.437,
    "bits_per_byte": 0.4321,
    "accuracy": 0.567,
    "num_stories": 8,
    "num_tokens": 99,
    "num_bytes": 400,
}
ENVIRONMENT = {
    "hardware": "An Abacus, 2 cores, 24 GB",
    "device": "cpu",
    "num_processes": 1,
    "mixed_precision": "bf16",
    "compile": False,
    "packages": {"python": "3.11.2", "torch": "2.13.0", "tinystories_slm": "0.7.8"},
}
STORY = {
    "prompt": "Once upon a time",
    "story": "Once upon a time, a fox.\n\nThe end.",
    "model": "runs/tales/best",
    "seed": 3,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "max_new_tokens": 40,
    "num_new_tokens": 5,
    "finished": True,
}


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """Five steps on a local file, in a directory whose path must not be published."""
    work = tmp_path_factory.mktemp("a private place")
    stories = work / "tales.jsonl"
    stories.write_text("".join(json.dumps({"text": f"The fox saw {i} hens. " * 3}) + "\n" for i in range(80)))
    flags = ["--config=configs/debug.yaml", f"--data.source={stories}", "--data.max_stories=80"]
    flags += [f"--data.data_dir={work / 'data'}", f"--output_dir={work / 'tales'}", "--train.max_steps=5"]
    return train(parse_config([*flags, "--tokenizer.vocab_size=300", "--data.seq_len=32"]))


@pytest.fixture
def run_dir(trained_run, tmp_path) -> Path:
    """A run as training leaves it."""
    return shutil.copytree(trained_run, tmp_path / "tales")


@pytest.fixture
def complete_run(run_dir) -> Path:
    """A run as `make story` leaves it, with evaluation and generated stories."""
    return complete(run_dir)


def complete(run_dir: Path) -> Path:
    """Add evaluation, environment and a story with fixed values."""
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION))
    (run_dir / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (run_dir / "stories.jsonl").write_text(json.dumps(STORY) + "\n")
    return run_dir


@pytest.fixture
def hub(tmp_path) -> Iterator[LoopbackHub]:
    """An empty Hub to which this process is logged in as `tester`."""
    with LoopbackHub() as hub, hub_connection(hub, tmp_path / "cache"):
        yield hub


@contextmanager
def hub_connection(hub: LoopbackHub, cache: Path) -> Iterator[None]:
    """Connect huggingface_hub to `hub` with an empty cache; it reads the environment only at import."""
    url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
            "HF_TOKEN_PATH": str(cache / "no token"),
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        # huggingface_hub waits seconds before it retries a request; here it does not wait.
        patch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
        _http.close_session()
        try:
            yield
        finally:
            patch.undo()
            _http.close_session()
