"""Stories beside their prompts: words in any regular form, features, sentences and summaries."""

import json

import pytest

from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.data.instruct import InstructBlock, format_block, prompt_text
from tinystories_slm.data.sources.builtin import generate_block
from tinystories_slm.evaluation import instruct
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.evaluation.instruct import compare_with_prompts, is_word_used
from tinystories_slm.evaluation.tasks import EvalContext, EvalResult, run_tasks
from tinystories_slm.generation.request import GenerationResult
from tinystories_slm.model_folder import save_model_folder


@pytest.mark.parametrize(
    ("word", "used", "unused"),
    [
        ("ball", "ball Ball! balls ball's (ball)", "balloon football ballet"),
        ("play", "plays played playing", "player plan"),
        ("played", "play playing", "plaid"),
        ("hope", "hopes hoped hoping", "hop"),
        ("stop", "stopped stopping stops", "top stoop"),
        ("cry", "cries cried crying", "crisp"),
        ("box", "boxes boxed", "bo fox"),
        ("sad", "sad,", "sadly sand"),
        ("run", "running runs", "ran"),
        ("thing", "things Thing", "th the"),
        ("bring", "bringing", "br bred"),
        ("ice-cream", "ice-cream", "ice"),
        ("Zoë", "zoë ZOË's", "zoe"),
        ("ice cream", "", "ice cream"),
    ],
)
def test_word_is_used_in_any_regular_form(word, used, unused):
    for form in used.split():
        assert is_word_used(word, f'He said: "The {form} is here."'), form
    for form in unused.split():
        assert not is_word_used(word, f"The {form} is here."), form


def values(shares):
    return {share.name: (round(share.value, 3), share.count) for share in shares}


def test_published_blocks_are_compared_by_words_dialogue_and_sentence():
    blocks = [
        InstructBlock(words=("ball", "sad"), features=("Dialogue", "BadEnding"), story='A sad ball. "Oh!"'),
        InstructBlock(
            words=("run",), features=("Dialogue",), random_sentence="He sat.", story="Tom\nran. He\nsat."
        ),
        InstructBlock(summary="Tom sat.", story="Tom sat."),
    ]
    shares = compare_with_prompts(blocks, ["Two balls. “Oh,” he said.", "He was running. He sat.", ""])
    assert values(shares) == {
        "words": (0.667, 3),
        "words_real": (0.667, 3),  # `ran` is an irregular form
        "dialogue": (0.5, 2),
        "dialogue_real": (0.5, 2),
        "sentence": (1.0, 1),
        "sentence_real": (1.0, 1),
        "unchecked": (0.333, 3),
    }
    assert shares[0].unit == "share of requested words"


def test_grammar_decides_on_its_own_stories():
    blocks = [generate_block(0, index) for index in range(120)]
    real = values(compare_with_prompts(blocks, [block.story for block in blocks]))
    assert {name.removesuffix("_real") for name in real} == {
        "words", "sentence", "summary", "dialogue", "moralvalue", "twist", "conflict", "grammar",
    }  # fmt: skip
    assert all(value == 1.0 for value, _ in real.values())
    assert real["words"][1] == 3 * sum(bool(block.words) for block in blocks)
    # Stories for other prompts have the dialogue and few of the other parts; with a wrong word, no summary.
    others = values(compare_with_prompts(blocks, [block.story for block in blocks[1:] + blocks[:1]]))
    assert others["dialogue"][0] == 1.0 and others["summary"][0] == 0.0
    assert 0 < others["words"][0] < 0.3 and others["moralvalue"][0] < 0.6
    wrong = values(compare_with_prompts(blocks, [block.story.replace(" was ", " wuz ") for block in blocks]))
    assert wrong["words"][0] > 0.9 and wrong["summary"][0] < 0.3 > wrong["moralvalue"][0]


def test_task_generates_a_story_for_each_held_out_prompt(monkeypatch):
    """Texts that are no blocks, blocks without a prompt, and those beyond the context are left out."""
    blocks = [generate_block(0, index) for index in range(30)]
    requested = [block for block in blocks if prompt_text(block) != "Story:"]
    held_out = ["Once upon a time.", *map(format_block, blocks), "Words: a\nStory:\n\n" + "word " * 2000]

    def prepare(model, tokenizer, prompts, seeds, sampling):
        assert prompts == list(map(prompt_text, requested)) and list(seeds) == [
            7 + i for i in range(len(prompts))
        ]
        return prompts

    def generate(model, tokenizer, requests, sampling, batch_size):
        for number, prompt in enumerate(requests):
            story = requested[number].story if number % 2 else ""
            yield GenerationResult(prompt, number, f"{prompt}\n\n{story}", 9, "stop")

    monkeypatch.setattr(instruct, "context_length", lambda model: 3000)
    monkeypatch.setattr(instruct, "prompt_token_ids", lambda model, tokenizer, text: list(text))
    monkeypatch.setattr(instruct, "prepare_requests", prepare)
    monkeypatch.setattr(instruct, "generate_batch", generate)
    results = run_tasks(["instruct"], EvalContext(model=None, tokenizer=None, seed=7, held_out=held_out))
    by_name = {result.name: result for result in results}
    num_words = 3 * sum(bool(block.words) for block in requested)
    used = 3 * sum(bool(block.words) for block in requested[1::2])
    assert by_name["instruct_words"] == EvalResult(
        "instruct_words", used / num_words, "share of requested words", num_words
    )
    assert by_name["instruct_words_real"].value == 1.0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_evaluate_measures_the_prompts_of_the_data(model_with_tokenizer, tokenizer, tmp_path, caplog):
    save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "device": "cpu", "tasks": "instruct"}
    (tmp_path / "blocks.txt").write_text(
        "Words: fox, hat\nStory:\n\nA fox.<|endoftext|>Words: fox\nStory:\nIt."
    )
    scores = evaluate(EvaluateArgs(**options, data=str(tmp_path / "blocks.txt"), output=tmp_path / "s.json"))
    generated, real = scores["tasks"]
    assert (generated["name"], generated["count"], generated["value"] <= 1) == ("instruct_words", 3, True)
    assert real == {
        "name": "instruct_words_real", "value": 1 / 3, "unit": "share of requested words", "count": 3,
    }  # fmt: skip
    assert json.loads((tmp_path / "s.json").read_text())["tasks"] == [generated, real]
    (tmp_path / "plain.txt").write_text("A fox ran.<|endoftext|>A fox sat.")
    assert "tasks" not in evaluate(EvaluateArgs(**options, data=str(tmp_path / "plain.txt")))
    assert "none of the 2 held-out stories is a block with a prompt" in caplog.text
