"""Which stories `evaluate` scores: by what the model was trained on, not by how its path is spelled."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHARED, tiny_model

from tinystories_slm import grammar
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.publish import ExportArgs
from tinystories_slm.data.source_stories import in_validation
from tinystories_slm.data.sources import builtin, local
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate, format_scores, write_scores
from tinystories_slm.evaluation.selection import count_training_stories, select_stories
from tinystories_slm.evaluation.training_data import TrainingData
from tinystories_slm.export import export
from tinystories_slm.model_folder import save_model_folder

STORIES = [f"The fox saw {i} hens." for i in range(60)]
HELD_OUT_30 = [story for story in STORIES if in_validation(story, 0.3)]
HELD_OUT_5 = [story for story in STORIES if in_validation(story, 0.05)]


def write_stories(path: Path, stories: list[str] = STORIES) -> Path:
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return path


def trained_on(path: Path, fraction: float = 0.3, **options) -> TrainingData:
    defaults = {"validation_split": "auto", "max_stories": None, "revision": local.content_hash(str(path))}
    return TrainingData(source=path.name, validation_fraction=fraction, **defaults | options)


def select(path: Path | str, *data: TrainingData, revision: str | None = None, **options):
    args = EvaluateArgs(model="m", data=str(path), **options)
    return select_stories(args, revision or local.content_hash(str(path)), list(data))


@pytest.fixture
def source(tmp_path) -> Path:
    return write_stories(tmp_path / "tales.jsonl")


def test_path_spelling_and_form_of_a_model_do_not_change_the_stories(
    source, tokenizer, tmp_path, monkeypatch
):
    model = tiny_model(vocab_size=len(tokenizer))
    model.config.training_data = [trained_on(source).to_dict()]
    best = save_model_folder(model, tokenizer, tmp_path / "run" / "best")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(best)
    (tmp_path / "link").symlink_to(best)
    shutil.copytree(best, tmp_path / "copy")
    exports = [
        export(ExportArgs(model=str(best), format=name, output=tmp_path / name))
        for name in ("custom", "native")
    ]
    spellings = [best, ".", "./", "~/run/best", "../best", tmp_path / "link", tmp_path / "copy", *exports]
    scores = [evaluate(EvaluateArgs(model=str(model), data=str(source))) for model in spellings]

    assert len(HELD_OUT_30) == 23 and len(HELD_OUT_5) == 5
    for result in scores:
        counts = [result[f"num_{name}stories"] for name in ("", "split_", "source_", "training_")]
        assert counts == [23, 23, 60, 0] and result["validation_fraction"] == 0.3
        assert result["loss"] == pytest.approx(scores[0]["loss"], rel=1e-6)
        assert "23 of 23 stories held out of 60, " in format_scores(result)


def test_source_with_one_split_is_scored_whole(source, tmp_path):
    for name in ("heldout.jsonl", "my_test.jsonl", "validation.jsonl"):
        selection = select(write_stories(tmp_path / name, STORIES[:50]), trained_on(source))
        assert selection.texts == STORIES[:50] and selection.num_training_stories == 0, name
        assert selection.split == ("validation" if name == "validation.jsonl" else "all")
    assert select(source).texts == STORIES  # a model of other data


def test_heldout_file_of_a_user_is_scored_whole(tokenizer, tmp_path, capsys):
    if not (file := SHARED / "cases" / "heldout_file" / "heldout.txt").is_file():
        pytest.skip("needs the shared case heldout_file")
    model = save_model_folder(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "best")
    result = evaluate(EvaluateArgs(model=str(model), data=str(file)))

    assert result["num_stories"] == result["num_split_stories"] == 200
    assert result["num_training_stories"] is None  # the model has no record
    assert "scored         200 of 200 stories, " in capsys.readouterr().out


def test_scored_training_stories_are_counted(source):
    data = trained_on(source, 0.05)
    whole = select(source, data, split="train")
    larger = select(source, data, validation_fraction=0.3)
    assert (len(whole.texts), whole.num_training_stories) == (60, 55)
    assert (len(larger.texts), larger.num_training_stories) == (23, 18)
    assert select(source, data, split="train", max_stories=1).num_training_stories == 1
    # The run read the first 20 stories only; of another version of the file, no story is known to be new.
    first = trained_on(source, 0.05, max_stories=20)
    assert select(source, first, split="train").num_training_stories == sum(
        not in_validation(story, 0.05) for story in STORIES[:20]
    )
    first = trained_on(source, 0.05, max_stories=20, revision="sha256:0")
    assert select(source, first, split="train").num_training_stories == 55


def test_stories_that_the_base_model_was_trained_on_are_not_held_out(source):
    selection = select(source, trained_on(source, 0.05), trained_on(source, 0.3))
    assert selection.texts == HELD_OUT_5 and selection.num_training_stories == 0
    runs = [trained_on(source, 0.05), trained_on(source, 0.3)]
    assert count_training_stories(HELD_OUT_30, runs) == 23 - 5
    assert count_training_stories(HELD_OUT_30, runs[1:]) == 0
    assert count_training_stories(HELD_OUT_5, runs[::-1]) == 0
    assert count_training_stories(["A validation split."], runs) == 0


def test_source_is_recognized_after_a_copy_or_an_edit(source, tmp_path, caplog):
    before = trained_on(source)
    copied = Path(shutil.copy(source, tmp_path / "other_name.jsonl"))
    assert select(copied, before).texts == HELD_OUT_30 and caplog.text == ""
    write_stories(source, [*STORIES, "A new story."])
    assert set(select(source, before).texts) <= {*HELD_OUT_30, "A new story."}
    assert "has the name of the model's training data and other contents" in caplog.text


def test_own_validation_split_is_used_as_in_training(tmp_path):
    write_stories(tmp_path / "train.jsonl")
    write_stories(tmp_path / "valid.jsonl", ["A dog.", "A cat."])
    assert select(tmp_path, trained_on(tmp_path)).texts == ["A dog.", "A cat."]
    held_out = trained_on(tmp_path, validation_split="holdout")
    assert select(tmp_path, held_out).texts == HELD_OUT_30
    assert select(tmp_path, held_out, split="train").num_training_stories == 60 - 23
    assert select(tmp_path, trained_on(tmp_path), split="train").num_training_stories == 60


def test_builtin_corpus_keeps_its_hold_out_for_any_model(monkeypatch):
    monkeypatch.setattr(builtin, "BUILTIN_STORIES", 200)
    selection = select("builtin", revision=f"grammar {grammar.VERSION}", max_stories=5)
    assert (selection.num_source_stories, selection.validation_fraction) == (200, 0.05)
    assert len(selection.texts) == 5 < selection.num_split_stories < 20


def test_missing_split_and_empty_selection_are_errors(source, tmp_path):
    with pytest.raises(UserError, match=r"has no split 'test', only 'train'; set --split"):
        select(source, split="test")
    with pytest.raises(UserError, match=r"no validation stories \(validation_fraction is 0.0001\)"):
        select(source, trained_on(source, 0.0001))
    with pytest.raises(UserError, match=r"empty.jsonl\) has no stories; use"):
        select(write_stories(tmp_path / "empty.jsonl", []))


def test_killed_write_of_scores_keeps_the_earlier_ones(tmp_path, monkeypatch):
    output = tmp_path / "evaluation.json"
    write_scores({"loss": 1.0}, output)
    write_text = Path.write_text

    def killed_write_text(path: Path, text: str, **options) -> int:
        write_text(path, text[:5], **options)
        raise SystemExit("killed")

    monkeypatch.setattr(Path, "write_text", killed_write_text)
    with pytest.raises(SystemExit, match="killed"):
        write_scores({"loss": 2.0}, output)
    assert json.loads(output.read_text()) == {"loss": 1.0}
    monkeypatch.undo()
    write_scores({"loss": 3.0}, Path("/dev/null"))
    (tmp_path / "link.json").symlink_to(output)
    write_scores({"loss": 4.0}, tmp_path / "link.json")
    assert json.loads(output.read_text()) == {"loss": 4.0}
