"""Built-in corpus as a reference: a correct loss cannot be below its exact entropy."""

import numpy as np
import pytest
from conftest import tiny_model

from tinystories_slm.config import parse_config
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.evaluation.evaluate import score_texts
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Model of 0.2M parameters, trained on 0.75M tokens; its tokenizer; the validation stories."""
    root = tmp_path_factory.mktemp("entropy")
    flags = {
        "output_dir": root / "run",
        "data.data_dir": root / "data",
        "data.max_stories": 6000,
        "data.packing": "document",
        "tokenizer.vocab_size": 2048,
        "model.family": "llama",
        "model.num_hidden_layers": 2,
        "model.hidden_size": 64,
        "model.num_attention_heads": 2,
        "model.qk_norm": "true",
        "train.max_steps": 400,
        "train.batch_size": 8,
        "train.per_device_batch_size": 8,
        "train.optimizer": "muon",
        "train.lr": 1e-2,
        "train.min_lr_rate": 0,
        "train.warmup_steps": 20,
        "train.eval_every": 400,
        "train.eval_stories": 20,
        "train.save_every": 400,
        "train.mixed_precision": "no",
    }
    config = parse_config([f"--{name}={value}" for name, value in flags.items()])
    train(config)
    texts = list(iter_raw_stories(config.data.data_dir, "validation"))
    return *load_model_folder(str(root / "run" / "best"), device="cpu"), texts


def test_trained_loss_is_above_entropy_by_less_than_half_a_nat(trained):
    model, tokenizer, texts = trained
    report = score_texts(model, tokenizer, texts[:200], batch_size=16, is_builtin_corpus=True)

    assert report["entropy"] == pytest.approx(0.18, abs=0.02)  # 40 nats over some 220 tokens
    assert report["entropy"] < report["loss"] < report["entropy"] + 0.5
    assert report["entropy_bits_per_byte"] < report["bits_per_byte"]


def test_untrained_loss_is_at_chance_level(trained):
    model, tokenizer, texts = trained
    untrained = tiny_model(vocab_size=len(tokenizer), family="llama", max_position_embeddings=256, scale=1.0)
    before = score_texts(untrained, tokenizer, texts[:20], batch_size=8)["loss"]
    after = score_texts(model, tokenizer, texts[:20], batch_size=8)["loss"]

    assert before == pytest.approx(np.log(len(tokenizer)), abs=0.2)  # chance
    assert after < before / 8
