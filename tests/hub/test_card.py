import json
import shutil

import pytest
from huggingface_hub import ModelCard

from tinystories_slm.config import parse_config
from tinystories_slm.hub.card import write_card
from tinystories_slm.training import train

FIGURES = {
    "loss": 1.23456,
    "perplexity": 3.437,
    "bits_per_byte": 0.4321,
    "accuracy": 0.567,
    "num_stories": 8,
    "num_tokens": 99,
    "num_bytes": 400,
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    work = tmp_path_factory.mktemp("a place that is nobody's business")
    stories = work / "tales.jsonl"
    stories.write_text("".join(json.dumps({"text": f"The fox saw {i} hens. " * 3}) + "\n" for i in range(80)))
    flags = ["--config=configs/debug.yaml", f"--data.source={stories}", "--data.max_stories=80"]
    flags += [f"--data.data_dir={work / 'data'}", f"--output_dir={work / 'tales'}", "--train.max_steps=5"]
    return train(parse_config([*flags, "--tokenizer.vocab_size=300", "--data.seq_len=32"]))


@pytest.fixture
def run_dir(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "tales")


def test_the_card_states_the_runs_own_facts_and_no_path(run_dir):
    (run_dir / "evaluation.json").write_text(json.dumps(FIGURES))
    text = write_card(run_dir).read_text()

    assert ModelCard(text).data.pipeline_tag == "text-generation"
    for fact in (
        "# tales",
        "tales.jsonl",
        "2 layers x 32",
        "context of 32",
        "vocabulary of 300",
        "| 1.2346 |",
    ):
        assert fact in text, fact
    assert "35,360 parameters" in text  # 300 x 32 + 32 x 32 + 24,736 of the blocks
    assert "nobody's business" not in text and "entropy" not in text


def test_what_is_not_known_is_left_out(run_dir):
    text = write_card(run_dir).read_text()
    assert "Evaluation" not in text and "nats" not in text

    figures = FIGURES | {"entropy": 0.1794, "entropy_bits_per_byte": 0.0672}
    (run_dir / "evaluation.json").write_text(json.dumps(figures))
    assert "own entropy on these stories\nis 0.1794 nats per token" in write_card(run_dir).read_text()
