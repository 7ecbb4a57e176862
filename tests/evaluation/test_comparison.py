"""Several models in one call: the same stories, tables in three forms, and a plot."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from tinystories_slm.config import parse
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.data.source_stories import in_validation
from tinystories_slm.data.sources import local
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.evaluation.selection import select_common_stories
from tinystories_slm.evaluation.training_data import TrainingData
from tinystories_slm.model_folder import save_model_folder

STORIES = [f"The Fox saw {i} hens. " * (1 + i % 7) for i in range(60)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Folders of two models, and of one whose tokenizer changes capitals."""
    folders = []
    for seed, normalizer in ((0, None), (1, None), (0, normalizers.Lowercase())):
        backend = train_bpe(STORIES[:9], 280)
        backend.normalizer = normalizer
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        model = tiny_model(seed=seed, vocab_size=280, scale=2.0, family="llama" if seed else "gpt2")
        folders.append(str(save_model_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "best")))
    return folders


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "tales.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    return path


def test_repeated_flag_gives_several_models():
    assert parse(EvaluateArgs, ["--model", "a", "--data", "d", "--model=[b]"]).models == ["a", "[b]"]
    assert parse(EvaluateArgs, ["--model", "null", "--data", "d"]).models == ["null"]
    assert EvaluateArgs(model="a", data="d").models == ["a"]
    with pytest.raises(UserError, match="must name a model"):
        EvaluateArgs(model=[], data="d")
    with pytest.raises(UserError, match="NUL"):
        parse(EvaluateArgs, ["--model", "a", "--data", "d", "--model=b\0"])


def test_models_are_compared_on_the_same_stories(models, stories, tmp_path, capsys):
    _, other, lossy = models
    options = {"data": str(stories), "device": "cpu"}
    alone = evaluate(EvaluateArgs(model=other, output=tmp_path / "one.json", **options))
    printed = capsys.readouterr().out
    assert "stories        every story: no record says that a model was trained on these data" in printed
    assert (
        "start, end     <|endoftext|>, <|endoftext|> (trained here)" in printed and "by position" in printed
    )
    report = evaluate(
        EvaluateArgs(model=models, output=tmp_path / "x.json", plot=tmp_path / "x.svg", **options)
    )
    assert json.loads((tmp_path / "x.json").read_text()) == report
    assert json.loads((tmp_path / "one.json").read_text())["loss"] == alone["loss"]
    results = report["models"]
    assert [scores["model"] for scores in results] == models and report["num_stories"] == 60
    same = [name for name in alone if name not in ("intervals", "model")]
    assert all(results[1][name] == alone[name] for name in same)
    difference = results[1]["text_bits_per_byte"] - results[0]["text_bits_per_byte"]
    low, high = results[1]["intervals"]["difference"]
    assert results[1]["difference"] == difference and low < difference < high
    assert "difference" not in results[0] and "difference" not in results[2]
    assert 0 < results[2]["lost_share"] < 0.1 and "bits_per_byte" not in results[2]
    assert len({scores["num_bytes"] for scores in results}) == 1

    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith(f"| {lossy} | lossy: ")]
    assert len(rows) == 1 and "% of bytes lost |" in rows[0]
    svg = (tmp_path / "x.svg").read_text()
    assert svg.count("<svg") == 1


def test_suffix_of_the_output_chooses_its_form(models, stories, tmp_path):
    options = {"data": str(stories), "device": "cpu", "max_stories": 5}
    evaluate(EvaluateArgs(model=models[:2], output=tmp_path / "x.csv", plot=tmp_path / "x.png", **options))
    with (tmp_path / "x.csv").open() as file:
        first, other = csv.DictReader(file)
    assert float(other["difference_low"]) <= float(other["difference"]) <= float(other["difference_high"])
    assert first["difference"] == "" and first["num_stories"] == "5" and first["start"] == "<|endoftext|>"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    report = evaluate(EvaluateArgs(model=models[:2], output=tmp_path / "x.md", **options))
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert lines[0].startswith("| model | bits per byte |") and lines[2].startswith(f"| {models[0]} | ")
    assert f"Selection: {report['selection']}." in lines and "the first 5 of them" in report["selection"]
    assert any(line.startswith("| model | 0 to 99 |") for line in lines)
    with pytest.raises(UserError, match=r"plot \(x.pdf\): must end in .png or .svg"):
        EvaluateArgs(model="m", data="d", plot=Path("x.pdf"))


def trained_on(path, fraction, **options) -> TrainingData:
    defaults = {"validation_split": "auto", "max_stories": None, "revision": local.content_hash(str(path))}
    return TrainingData(source=path.name, validation_fraction=fraction, **defaults | options)


def test_common_stories_are_new_to_every_model(stories, caplog):
    args = EvaluateArgs(model=["a", "b", "c"], data=str(stories))
    revision = local.content_hash(str(stories))
    both = [[trained_on(stories, 0.3)], None, [trained_on(stories, 0.1)]]
    for models in (both, both[::-1]):
        selection = select_common_stories(args, revision, models)
        assert selection.texts == [story for story in STORIES if in_validation(story, 0.1)]
        assert sorted(selection.num_training_by_model, key=str) == [0, 0, None]
        assert "held out by a hash" in selection.reason
    assert "differently" not in caplog.text
    select_common_stories(args, revision, [*both[:2], [trained_on(stories, 0.1, cleaning=["blanks"])]])
    assert f"the runs of the models cleaned {stories} differently" in caplog.text
    whole = EvaluateArgs(model=["a", "b"], data=str(stories), split="train")
    selection = select_common_stories(whole, revision, both[:2])
    counts = selection.num_training_by_model
    assert counts == [sum(not in_validation(story, 0.3) for story in STORIES), None]
    assert selection.record(0)["num_training_stories"] == counts[0] > 0
    assert selection.reason == "the train split of the data"


def test_damaged_model_ends_the_comparison_before_anything_is_written(models, stories, tmp_path):
    model = tiny_model(vocab_size=280)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(STORIES[:9], 280), **special)
    damaged = save_model_folder(model, tokenizer, tmp_path / "damaged")
    args = EvaluateArgs(
        model=[models[0], str(damaged)], data=str(stories), output=tmp_path / "x.json", device="cpu"
    )
    with pytest.raises(UserError, match=r"model \(.*damaged\): .* not finite.*model\.norm\.weight"):
        evaluate(args)
    assert not (tmp_path / "x.json").exists()
