import pytest
import torch
from conftest import tiny_model

from tinystories_slm.errors import InputError
from tinystories_slm.generation import Sampling, StoryStream, begin, generate_stories, tell_stories

EOS = "<|endoftext|>"


def test_a_seed_makes_stories_exact_and_leaves_the_callers_randomness_alone(model_with_tokenizer, tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate_stories(model_with_tokenizer, tokenizer, ["Once"] * 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(2)
    assert first == generate_stories(model_with_tokenizer, tokenizer, ["Once"] * 3, seed=5)
    assert first != generate_stories(model_with_tokenizer, tokenizer, ["Once"] * 3, seed=6)
    assert len(set(first)) == 3
    assert all(story.startswith("Once") for story in first)


def test_prompts_of_different_length_in_one_batch_are_told_as_if_alone(model_with_tokenizer, tokenizer):
    prompts = ["Once upon a time", "The fox", ""]
    settings = {"temperature": 0.0, "max_new_tokens": 20}
    together = generate_stories(model_with_tokenizer, tokenizer, prompts, **settings)

    assert together == [
        generate_stories(model_with_tokenizer, tokenizer, [p], **settings)[0] for p in prompts
    ]


def test_a_story_never_outgrows_the_context(model_with_tokenizer, tokenizer):
    calls = []
    hook = model_with_tokenizer.register_forward_hook(lambda *_: calls.append(1))
    generate_stories(model_with_tokenizer, tokenizer, ["Once"], max_new_tokens=1000, temperature=0.0)
    hook.remove()
    assert len(calls) == 48 - len([EOS, *tokenizer("Once").input_ids])  # one token each, none ended it
    with pytest.raises(InputError, match=r"prompt is \d+ tokens long and the model's context is 48"):
        generate_stories(model_with_tokenizer, tokenizer, ["fox " * 60])


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
        ({"min_p": 1.5}, r"min_p \(1.5\) must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0.0\)"),
        ({"repetition_penalty": float("nan")}, r"repetition_penalty \(nan\)"),
    ],
)
def test_settings_out_of_range_are_refused(model_with_tokenizer, tokenizer, setting, message):
    with pytest.raises(InputError, match=message):
        generate_stories(model_with_tokenizer, tokenizer, ["Once"], **setting)


def test_top_k_and_top_p_narrow_the_choice(model_with_tokenizer, tokenizer):
    greedy = generate_stories(model_with_tokenizer, tokenizer, ["Once"], temperature=0.0)
    assert (
        generate_stories(model_with_tokenizer, tokenizer, ["Once"], temperature=2.0, top_k=1, seed=3)
        == greedy
    )
    assert (
        generate_stories(
            model_with_tokenizer, tokenizer, ["Once"], temperature=2.0, top_k=0, top_p=1e-6, seed=3
        )
        == greedy
    )
    assert (
        generate_stories(
            model_with_tokenizer, tokenizer, ["Once"], temperature=2.0, top_k=0, top_p=1.0, seed=3
        )
        != greedy
    )


def told(model_with_tokenizer, tokenizer, beginnings, sampling, batch_size):
    return list(tell_stories(model_with_tokenizer, tokenizer, beginnings, sampling, batch_size=batch_size))


def test_a_story_is_the_same_alone_in_any_batch_and_streamed(model_with_tokenizer, tokenizer):
    sampling = Sampling(max_new_tokens=40, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.3)
    prompts = ["Once upon a time", "The fox", "", "The fox", "Once upon a time there was a fox. The fox", "A"]
    beginnings = begin(model_with_tokenizer, tokenizer, prompts, [3, 4, 5, 6, 3, 3], sampling)
    stories = told(model_with_tokenizer, tokenizer, beginnings, sampling, batch_size=6)

    assert [story.prompt for story in stories] == prompts
    assert len({story.text for story in stories}) == 6
    assert stories == told(model_with_tokenizer, tokenizer, beginnings, sampling, batch_size=1)
    assert stories == told(model_with_tokenizer, tokenizer, beginnings[::-1], sampling, batch_size=4)[::-1]
    for beginning, story in zip(beginnings, stories, strict=True):
        assert len(beginning.token_ids) + beginning.budget <= 48
        stream = StoryStream(model_with_tokenizer, tokenizer, beginning, sampling)
        assert ("".join(stream), stream.story) == (story.text, story)
    with_neighbours = generate_stories(model_with_tokenizer, tokenizer, ["A", "The fox", "The fox"], seed=9)
    assert with_neighbours[1:] == generate_stories(model_with_tokenizer, tokenizer, ["The fox"] * 2, seed=10)


def test_a_long_neighbour_shortens_nobodys_story(model_with_tokenizer, tokenizer):
    sampling = Sampling(max_new_tokens=1000, temperature=0.0)
    prompts = ["fox " * 10, "The fox", "The fox"]
    sizes = []
    hook = model_with_tokenizer.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    beginnings = begin(model_with_tokenizer, tokenizer, prompts, [0, 1, 2], sampling)
    stories = told(model_with_tokenizer, tokenizer, beginnings, sampling, batch_size=3)
    hook.remove()

    for beginning, story in zip(beginnings, stories, strict=True):
        assert story.num_new_tokens == beginning.budget == 48 - len(beginning.token_ids)
    assert set(sizes) == {1, 2}  # what may be told together is


def test_the_budget_and_the_end_are_told_apart(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False, family="modern", scale=1.0)
    sampling = Sampling(max_new_tokens=5, temperature=0.0)
    beginnings = begin(model, tokenizer, ["The fox"], [0], sampling)
    [story] = told(model, tokenizer, beginnings, sampling, 1)
    assert (story.num_new_tokens, story.finished) == (5, False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    [story] = told(model, tokenizer, beginnings, sampling, 1)
    assert (story.num_new_tokens, story.finished, story.text) == (0, True, "The fox")


class Recites(torch.nn.Module):
    """Stands in a model's head: whatever the story so far, the next token is that of a given text."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        super().__init__()
        self.ids, self.vocab_size, self.said = ids, vocab_size, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.vocab_size)
        logits[:, -1, self.ids[min(self.said, len(self.ids) - 1)]] = 100.0
        self.said += 1
        return logits


def reciter(tokenizer, text: str, end: bool = False):
    model = tiny_model(vocab_size=len(tokenizer), family="modern", tie_word_embeddings=False)
    model.lm_head = Recites(tokenizer(text).input_ids + [0] * end, len(tokenizer))
    return model


def recited(tokenizer, text, end=False, finish_sentence=True) -> tuple[list[str], object]:
    """(Pieces, story) of a model that goes on from "The fox" with `text` and ends, or is cut short there."""
    sampling = Sampling(max_new_tokens=len(tokenizer(text).input_ids) + end)
    model = reciter(tokenizer, text, end)
    model.config.max_position_embeddings = 500
    [beginning] = begin(model, tokenizer, ["The fox"], [0], sampling)
    stream = StoryStream(model, tokenizer, beginning, sampling, finish_sentence=finish_sentence)
    pieces = list(stream)
    model.lm_head.said = 0
    [whole] = tell_stories(
        model, tokenizer, [beginning], sampling, batch_size=1, finish_sentence=finish_sentence
    )
    assert stream.story == whole and "".join(pieces) == whole.text
    return pieces, whole


def test_a_story_that_the_budget_ends_is_cut_after_its_last_full_sentence(tokenizer):
    text = ' ran. "Hi!" said Mr. Owl. He was'
    pieces, story = recited(tokenizer, text)
    assert story.text == 'The fox ran. "Hi!" said Mr. Owl.' and not story.finished
    assert story.num_new_tokens == len(tokenizer(text).input_ids)
    assert pieces == ["The ", "fox", " ran.", ' "Hi!" said Mr. Owl.']  # whole sentences after the prompt

    assert recited(tokenizer, text, end=True)[1].text == "The fox" + text  # the model ended it so
    assert recited(tokenizer, text, finish_sentence=False)[1].text == "The fox" + text
    assert recited(tokenizer, " was in the")[1].text == "The fox was in the"  # no full sentence to keep


def test_no_piece_cuts_a_character(tokenizer):
    text = " saw Zoë 🦊🦊 and\n 狐狸 é"
    pieces, story = recited(tokenizer, text, finish_sentence=False)
    assert story.text == "The fox" + text
    assert len(pieces) >= 5 and not any("\ufffd" in piece for piece in pieces)
    assert any(piece.endswith("狐") for piece in pieces)  # what has no blanks does not wait for one


def test_a_listener_who_leaves_stops_the_model(tokenizer):
    model = reciter(tokenizer, " ran" * 30)
    sampling = Sampling(max_new_tokens=10_000)
    model.config.max_position_embeddings = 20_000
    [beginning] = begin(model, tokenizer, ["The fox"], [0], sampling)
    pieces = iter(StoryStream(model, tokenizer, beginning, sampling))
    assert next(pieces) == "The "
    pieces.close()
    assert model.lm_head.said < 5000


def test_an_error_in_the_middle_comes_out_where_the_pieces_are_read(
    model_with_tokenizer, tokenizer, monkeypatch
):
    [beginning] = begin(model_with_tokenizer, tokenizer, ["The fox"], [0], Sampling())

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model_with_tokenizer, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(StoryStream(model_with_tokenizer, tokenizer, beginning, Sampling()))
