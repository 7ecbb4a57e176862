"""Surprisal of each token: against the logits, against `evaluate`, and after a kill."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_script
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.inspection import SurprisalArgs
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.inspection import surprisal as module
from tinystories_slm.inspection.surprisal import surprisal
from tinystories_slm.model_folder import save_model_folder

STORY = "Once upon a time there was a fox with {0} hats. The f\u00f6x \U0001f98a was happy. "
TEXTS = [STORY.format(number) * (1 + number % 3) for number in range(9)]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text.strip()}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def folder(model_with_tokenizer, tokenizer, tmp_path):
    return save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "model")


def args_of(folder, stories, tmp_path, **options) -> SurprisalArgs:
    values = {"model": str(folder), "data": str(stories), "output": tmp_path / "s.parquet", "device": "cpu"}
    return SurprisalArgs(**values | options)


def test_rows_are_those_of_the_logits(folder, stories, tmp_path, model_with_tokenizer, tokenizer):
    rows = pq.read_table(surprisal(args_of(folder, stories, tmp_path))).to_pandas()
    assert list(rows["story"].unique()) == list(range(9))
    text = TEXTS[0].strip()  # shorter than the context of 48
    own = rows[rows["story"] == 0]
    ids = [0, *own["token_id"]]
    assert ids[-1] == 0 and tokenizer.decode(ids[1:-1]) == text
    with torch.no_grad():
        log_probs = model_with_tokenizer(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(dim=-1)
    chosen = log_probs[range(len(ids) - 1), ids[1:]]
    assert own["nats"].to_numpy() == pytest.approx(-chosen.numpy(), abs=1e-4)
    assert own["rank"].tolist() == (1 + (log_probs > chosen[:, None]).sum(dim=1)).tolist()
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    assert own["entropy"].to_numpy() == pytest.approx(entropy.numpy(), abs=1e-4)

    for number, story in enumerate(map(str.strip, TEXTS)):
        own = rows[rows["story"] == number]
        assert own["token"].tolist() == list(range(len(own)))
        assert own["start"].iloc[0] == 0 and own["end"].iloc[-1] == own["start"].iloc[-1] == len(story)
        assert (own["start"].to_numpy()[1:] == own["end"].to_numpy()[:-1]).all()  # no character is left out
        for token in own[:-1].itertuples():
            piece = story[token.start : token.end]
            if piece.isascii() and piece:
                assert tokenizer.decode([token.token_id]) == piece


def test_sums_equal_those_of_evaluate(folder, stories, tmp_path):
    rows = pq.read_table(surprisal(args_of(folder, stories, tmp_path, batch_size=5))).to_pandas()
    scores = evaluate(EvaluateArgs(model=str(folder), data=str(stories), device="cpu"))
    assert len(rows) == scores["num_tokens"]
    nats = rows["nats"].to_numpy().astype(np.float64).sum()
    assert nats == pytest.approx(scores["loss"] * scores["num_tokens"], rel=1e-5)
    assert (rows["rank"] == 1).mean() == pytest.approx(scores["accuracy"])


def test_a_killed_command_continues_and_writes_the_same_bytes(folder, stories, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_PART_STORIES", 2)
    whole = surprisal(args_of(folder, stories, tmp_path, output=tmp_path / "whole.parquet"))
    score_tokens, scored = module.score_tokens, []

    def killed(*args, **options):
        if len(scored) == 3:
            raise SystemExit("killed")
        scored.append(options["first_story"])
        return score_tokens(*args, **options)

    args = args_of(folder, stories, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "score_tokens", killed)
        surprisal(args)
    assert not args.output.exists()

    def counted(*args, **options):
        scored.append(options["first_story"])
        return score_tokens(*args, **options)

    monkeypatch.setattr(module, "score_tokens", counted)
    surprisal(args)
    assert scored == [0, 2, 4, 6, 8]
    assert args.output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("s.*")) == ["s.parquet"]

    surprisal(args)
    assert scored == [0, 2, 4, 6, 8] and "s.parquet is complete" in caplog.text
    surprisal(args_of(folder, stories, tmp_path, max_stories=2))  # other stories: another file
    assert scored[5:] == [0] and len(pq.read_table(args.output)["story"].unique()) == 2


def test_the_page_shows_each_token(folder, stories, tmp_path):
    output = tmp_path / "s.parquet"
    done = run_script(
        "surprisal.py", f"--model={folder}", f"--data={stories}", f"--output={output}", "--plot_story=4",
        "--device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "s.story4.html").read_text()
    rows = pq.read_table(output, filters=[("story", "=", 4)]).to_pylist()
    assert page.count('<span style="--shade:') == len(rows) and "<script src" not in page
    assert f"{max(row['nats'] for row in rows):.2f} nats, rank" in page
    assert "s.story4.html" in done.stdout and "nats per token" in done.stdout


def test_a_foreign_model_without_start_token_has_no_rank_for_its_first_token(stories, tmp_path, tokenizer):
    torch.manual_seed(0)
    foreign = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    )
    foreign.save_pretrained(tmp_path / "foreign")
    tokenizer.save_pretrained(tmp_path / "foreign")
    assert AutoTokenizer.from_pretrained(tmp_path / "foreign").is_fast
    args = args_of(tmp_path / "foreign", stories, tmp_path, end_token="unscored")
    rows = pq.read_table(surprisal(args)).to_pandas()
    firsts = rows[rows["token"] == 0]
    assert firsts["rank"].isna().all()
    assert firsts["nats"].to_numpy() == pytest.approx(np.log(len(tokenizer)), rel=1e-6)
    assert rows[rows["token"] > 0]["rank"].between(1, len(tokenizer)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plot_story": 9}, r"plot_story \(9\): must be below 9, the number of stories"),
        ({"plot_story": -1}, r"plot_story \(-1\) must be at least 0"),
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"split": "dev"}, r"has no split 'dev'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(options, message, folder, stories, tmp_path):
    with pytest.raises(UserError, match=message):
        surprisal(args_of(folder, stories, tmp_path, **options))
    assert list(tmp_path.glob("s.*")) == []
    with pytest.raises(UserError, match=r"output .*: must end in .parquet"):
        args_of(folder, stories, tmp_path, output=tmp_path / "s.csv")
