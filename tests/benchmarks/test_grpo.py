import pytest
from grpo import PROMPT, main, reward_accepted, wilson_interval

from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.grammar import generate_corpus
from tinystories_slm.model_folder import load_model_folder, save_model_folder

from conftest import tiny_model  # isort: skip


def test_reward_is_one_for_stories_of_the_grammar_alone():
    story = next(story for story in generate_corpus(20, seed=3) if story.startswith(PROMPT))
    completion = story.removeprefix(PROMPT)
    assert reward_accepted([completion, completion[:-1], completion + " The", ""]) == [1.0, 0.0, 0.0, 0.0]


def test_wilson_interval_of_a_share():
    # Brown, Cai & DasGupta (2001): no interval of width 0 at a share of 0.
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(39, 256) == pytest.approx((0.1135, 0.2015), abs=1e-4)


@pytest.mark.slow
def test_grpo_trains_and_saves(tmp_path, capsys):
    pytest.importorskip("trl", reason="pip install 'tinystories_slm[finetune]'")
    tokenizer = train_story_tokenizer(list(generate_corpus(20, seed=1)), 280)
    model = tiny_model(vocab_size=280, pad_token_id=tokenizer.pad_token_id, family="llama")
    save_model_folder(model, tokenizer, tmp_path / "best")
    options = ["--max_steps", "1", "--num_stories", "4", "--max_new_tokens", "8"]
    shares = main(["--model", str(tmp_path / "best"), "--output", str(tmp_path / "grpo"), *options])
    assert shares == [(0, 4), (0, 4)]
    printed = capsys.readouterr().out
    assert "before: 0 of 4 stories accepted, 0.0% (0.0% to 49.0%)" in printed
    assert "mean reward of each step: 0.00" in printed
    assert type(load_model_folder(str(tmp_path / "grpo"), device="cpu")[0]) is type(model)
