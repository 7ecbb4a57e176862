"""Option names of earlier versions, wherever somebody may have kept one."""

import json
import logging

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import load_config, parse, parse_config
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.renamed import RENAMED_OPTIONS, rename_in_yaml
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model_folder import load_model_folder, save_model_folder
from tinystories_slm.training.checkpoints import read_progress
from tinystories_slm.training.retention import KeptSteps

# Earlier option and value; section, field and value now.
EARLIER = [
    ("data.windows", "stream", "data", "packing", "contiguous"),
    ("data.windows", "story", "data", "packing", "document"),
    ("data.validation", "cut", "data", "validation_split", "holdout"),
    ("data.validation", "auto", "data", "validation_split", "auto"),
    ("model.family", "gpt", "model", "family", "gpt2"),
    ("model.family", "modern", "model", "family", "llama"),
    ("train.embedding_lr_rate", "0.5", "train", "embedding_lr_multiplier", 0.5),
    ("train.kernels", "torch", "train", "cpu_kernels", "torch"),
    ("train.max_skipped_in_a_row", "7", "train", "max_consecutive_skipped_steps", 7),
    ("train.momentum", "0.8", "train", "muon_momentum", 0.8),
    ("train.ns_steps", "3", "train", "muon_ns_steps", 3),
]


def test_earlier_options_that_are_one_now_are_joined(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "config.yaml"
    for text in (
        "train:\n  save_every: 9\n  keep_checkpoints: 3  # three\n  retention: all\n  lr: 0.5\n",
        "train: {save_every: 9, retention: all, lr: 0.5, keep_checkpoints: 3}\n",
    ):
        path.write_text(text)
        train = parse_config(["--config", str(path)]).train
        assert (train.keep, train.save_every, train.lr) == ("newest:3,all:full", 9, 0.5)
    assert "train.keep_checkpoints=3, train.retention=all is now train.keep=newest:3,all:full" in caplog.text
    flags = ["--train.retention", "powers_of_two", "--train.lr=0.5", "--train.keep_checkpoints=1"]
    assert parse_config(flags).train.keep == "newest:1,log:full"
    path.write_text("train:\n  keep_checkpoints: 2\n  retention: newest\n")  # of every earlier run
    assert parse_config(["--config", str(path)]).train.keep == "newest:2"
    assert not KeptSteps.parse(parse_config(["--train.retention=newest"]).train.keep).rules


def test_every_renamed_option_is_in_the_table_of_this_test():
    assert {option for option, *_ in EARLIER} | {"decoding"} == set(RENAMED_OPTIONS)


@pytest.mark.parametrize(
    ("value", "expected"), [("plain", "hf"), ("torch", "torch"), ("native", "cpu"), ("auto", "auto")]
)
@pytest.mark.parametrize("form", ["file", "flag", "flag with ="])
def test_earlier_decoding_flag_sets_the_backend(value, expected, form, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "generate.yaml"
    path.write_text(f"model: m\ndecoding: {value}\n")
    argv = {
        "file": ["--config", str(path)],
        "flag": ["--model", "m", "--decoding", value],
        "flag with =": ["--model", "m", f"--decoding={value}"],
    }[form]

    assert parse(GenerateArgs, argv).backend == expected
    [record] = caplog.records
    assert "decoding" in record.message and "is now" in record.message and "backend" in record.message


@pytest.mark.parametrize(("option", "value", "section", "field", "expected"), EARLIER)
@pytest.mark.parametrize("form", ["file", "flag", "flag with ="])
def test_an_earlier_name_is_read_and_reported(
    option, value, section, field, expected, form, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    earlier_section, _, name = option.partition(".")
    path = tmp_path / "config.yaml"
    path.write_text(f"# kept\n{earlier_section}:\n  {name}: {value}  # and this\n")
    argv = {
        "file": ["--config", str(path)],
        "flag": [f"--{option}", value],
        "flag with =": [f"--{option}={value}"],
    }[form]

    assert getattr(getattr(parse_config(argv), section), field) == expected
    assert "is now" in caplog.text or value == "auto"


def test_current_names_are_read_without_a_word(caplog):
    caplog.set_level(logging.INFO)
    config = parse_config(["--config=configs/minute.yaml", "--data.packing=document", "--model.family=llama"])
    assert (config.data.packing, config.model.family) == ("document", "llama")
    assert caplog.text == ""


@given(st.text())
def test_text_that_is_not_yaml_is_left_to_the_parser(text):
    assert rename_in_yaml(text, RENAMED_OPTIONS) == text or any(
        option.split(".")[-1] in text for option in RENAMED_OPTIONS
    )


def test_layout_and_comments_of_a_file_stay():
    text = "model:\n  family: modern   # Llama's\n\ndata: {windows: story, seq_len: 128}\n"
    expected = "model:\n  family: llama   # Llama's\n\ndata: {packing: document, seq_len: 128}\n"
    assert rename_in_yaml(text, RENAMED_OPTIONS) == expected


def test_the_saved_configuration_of_an_earlier_run_loads(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  family: modern\ntrain:\n  optimizer: muon\n  ns_steps: 4\n  momentum: 0.85\n")
    config = load_config(path)
    assert (config.model.family, config.train.muon_ns_steps, config.train.muon_momentum) == ("llama", 4, 0.85)


@pytest.mark.parametrize(("earlier", "family"), [("gpt", "gpt2"), ("modern", "llama")])
def test_a_model_folder_with_the_earlier_family_loads(earlier, family, tokenizer, tmp_path):
    assert TinyStoriesConfig(family=earlier).family == family
    model = tiny_model(family=family, vocab_size=len(tokenizer))
    folder = save_model_folder(model, tokenizer, tmp_path / "best")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["family"] == family
    path.write_text(json.dumps(config | {"family": earlier}))

    loaded, _ = load_model_folder(str(folder), device="cpu")
    ids = torch.tensor([[0, 5, 6]])
    assert loaded.config.family == family and torch.equal(loaded(ids).logits, model(ids).logits)


def test_records_of_earlier_versions_load(tmp_path):
    counts = {"num_stories": 9, "num_tokens": 900, "num_bytes": 3000}
    manifest = {
        "source": "builtin", "revision": "grammar 1", "requested_revision": None, "text_column": "text",
        "validation": "cut", "validation_fraction": 0.05, "max_stories": None, "tokenizer_sha256": "0",
        "vocab_size": 300, "eos_token_id": 0, "token_dtype": "uint16", "code_version": "0.1.0",
        "splits": {"train": counts, "validation": counts},
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.load(tmp_path / "manifest.json").provenance.validation_split == "holdout"

    checkpoint = tmp_path / "step_000003"
    checkpoint.mkdir()
    record = {"progress": {"step": 3, "skipped_in_a_row": 2}, "sha256": {}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    assert read_progress(checkpoint).consecutive_skipped_steps == 2
