import pytest
import torch
from conftest import run_script, tiny_model
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data.tokenizer import learn_bpe
from tinystories_slm.errors import InputError
from tinystories_slm.generation import generate_stories
from tinystories_slm.model_folder import save_model_folder

EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = learn_bpe(["Once upon a time there was a fox. The fox was happy."] * 3, 280)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=48
    )


@pytest.fixture(scope="module")
def teller(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), scale=4.0)


def test_a_seed_makes_stories_exact_and_leaves_the_callers_randomness_alone(teller, tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate_stories(teller, tokenizer, ["Once"] * 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)

    assert first == generate_stories(teller, tokenizer, ["Once"] * 3, seed=5)
    assert first != generate_stories(teller, tokenizer, ["Once"] * 3, seed=6)
    assert len(set(first)) == 3
    assert all(story.startswith("Once") for story in first)


def test_prompts_of_different_length_in_one_batch_are_told_as_if_alone(teller, tokenizer):
    prompts = ["Once upon a time", "The fox", ""]
    settings = {"temperature": 0.0, "max_new_tokens": 20}
    together = generate_stories(teller, tokenizer, prompts, **settings)

    assert together == [generate_stories(teller, tokenizer, [p], **settings)[0] for p in prompts]


def test_a_story_never_outgrows_the_context(teller, tokenizer):
    calls = []
    hook = teller.register_forward_hook(lambda *_: calls.append(1))
    generate_stories(teller, tokenizer, ["Once"], max_new_tokens=1000, temperature=0.0)
    hook.remove()
    assert len(calls) == 48 - len([EOS, *tokenizer("Once").input_ids])  # one token each, none ended it
    with pytest.raises(InputError, match=r"prompt is \d+ tokens long and the model's context is 48"):
        generate_stories(teller, tokenizer, ["fox " * 60])


def test_it_stops_at_the_end_of_text(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False, family="modern", scale=1.0)
    with torch.no_grad():  # a head that always prefers id 0
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generate_stories(model, tokenizer, ["Once"], temperature=0.0) == ["Once"]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_p": 1.5}, r"top_p \(1.5\) must lie in \(0, 1\]"),
        ({"top_p": 0.0}, r"top_p \(0.0\)"),
        ({"top_k": -1}, r"top_k \(-1\)"),
        ({"temperature": -0.1}, r"temperature \(-0.1\)"),
        ({"temperature": 1e-9}, r"temperature \(1e-09\).*at least 0.001"),
        ({"temperature": float("nan")}, r"temperature \(nan\)"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
    ],
)
def test_settings_out_of_range_are_refused(teller, tokenizer, setting, message):
    with pytest.raises(InputError, match=message):
        generate_stories(teller, tokenizer, ["Once"], **setting)


def test_top_k_and_top_p_narrow_the_choice(teller, tokenizer):
    greedy = generate_stories(teller, tokenizer, ["Once"], temperature=0.0)
    assert generate_stories(teller, tokenizer, ["Once"], temperature=2.0, top_k=1, seed=3) == greedy
    assert (
        generate_stories(teller, tokenizer, ["Once"], temperature=2.0, top_k=0, top_p=1e-6, seed=3) == greedy
    )
    assert (
        generate_stories(teller, tokenizer, ["Once"], temperature=2.0, top_k=0, top_p=1.0, seed=3) != greedy
    )


def test_the_script_tells_the_stories_asked_for(teller, tokenizer, tmp_path):
    folder = save_model_folder(teller, tokenizer, tmp_path / "best")
    args = ["--model", str(folder), "--prompt", "The fox", "--num_stories", "2", "--seed", "0"]
    done = run_script("generate.py", *args, "--max_new_tokens", "8")

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The fox") == 2 and done.stdout.count("---") == 1
    assert "on cpu" in done.stderr
    for bad, message in [
        (["--top_p", "1.5"], "error: top_p (1.5) must lie in (0, 1]; try 0.95, or 1 to switch it off"),
        (["--prompt", "fox " * 60], "error: the prompt is"),
        (["--model", str(tmp_path / "absent")], "no model folder"),
    ]:
        done = run_script("generate.py", *args, *bad)
        assert done.returncode == 2
        assert message in done.stderr and done.stderr.strip().count("\n") <= 1
        assert "Traceback" not in done.stderr
