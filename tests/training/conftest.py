"""A prepared corpus of 300 stories, shared; configurations that train on it in a second or two."""

from pathlib import Path

import pytest

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.data.prepare import prepare_data

_BASE = ["--data.max_stories", "300", "--data.seq_len", "32", "--tokenizer.vocab_size", "300"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    config = parse_config([*_BASE, "--data.data_dir", str(folder)])
    prepare_data(config.data, config.tokenizer)
    return folder


@pytest.fixture
def tiny_run(data_dir, tmp_path):
    """A function from flags to a RunConfig; its output folder is `tmp_path / name`."""

    def configure(*flags: str, name: str = "run") -> RunConfig:
        return parse_config([*_base_flags(data_dir, tmp_path / name), *flags])

    return configure


def _base_flags(data_dir: Path, output_dir: Path) -> list[str]:
    flags = {
        "data.data_dir": data_dir,
        "output_dir": output_dir,
        "model.num_hidden_layers": 2,
        "model.hidden_size": 16,
        "model.num_attention_heads": 2,
        "train.max_steps": 12,
        "train.warmup_steps": 2,
        "train.batch_size": 8,
        "train.per_device_batch_size": 8,
        "train.lr": 1e-2,
        "train.eval_every": 4,
        "train.eval_stories": 6,
        "train.save_every": 4,
        "train.log_every": 1,
        "train.mixed_precision": "no",
    }
    return [*_BASE, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
