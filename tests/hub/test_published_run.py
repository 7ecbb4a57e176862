import pytest

from tinystories_slm.config import parse_config, save_config
from tinystories_slm.errors import UserError
from tinystories_slm.hub.published_run import PublishedRun, redact_paths


def test_run_with_an_invalid_configuration_is_rejected(complete_run):
    with (complete_run / "config.yaml").open("a") as file:
        file.write("unheard_of: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml cannot be loaded \(unknown option 'unheard_of'"):
        PublishedRun.load(complete_run)


def test_published_configuration_has_no_local_paths(complete_run):
    path = complete_run / "config.yaml"
    flags = [
        f"--tokenizer.pretrained={complete_run / 'best'}",
        f"--train.resume={complete_run}/checkpoints/step_000005",
    ]
    original = parse_config([f"--config={path}", *flags])
    save_config(original, path)
    config = PublishedRun.load(complete_run).config
    assert config.train.lr == original.train.lr and config.model == original.model
    assert (str(config.output_dir), str(config.data.data_dir)) == ("tales", "data")
    assert (config.tokenizer.pretrained, config.train.resume) == ("best", "step_000005")


def test_redact_paths_keeps_hub_ids_and_generated_text():
    values = {
        "model": "tester/tales",
        "story": "/home/fox",
        "list": [{"data": "../a/tales.jsonl"}],
        "seed": 3,
    }
    assert redact_paths(values) == values | {"list": [{"data": "tales.jsonl"}]}
