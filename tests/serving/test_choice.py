"""Parts of a choice: the end of a text is complete, and its tokens are counted."""

import random

import pytest

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.generation.detokenizer import IncrementalDetokenizer
from tinystories_slm.generation.sampling import TokenLogprobs
from tinystories_slm.serving.choice import Choice, Piece
from tinystories_slm.serving.stop_strings import StopStrings


def choice(tokenizer, limit: int, stops: tuple[str, ...] = (), **options) -> Choice:
    return Choice(
        0, [1], limit, random.Random(0), SamplingParams(), detokenizer=IncrementalDetokenizer(tokenizer, []),
        stops=StopStrings(stops), stop_ids=[tokenizer.eos_token_id], emit=lambda _: None, **options,
    )  # fmt: skip


def take_all(one: Choice, ids: list[int]) -> list[Piece]:
    pieces = []
    for token in ids:
        one.append(token)
        if one.num_top_logprobs is not None:
            one.logprobs.append(TokenLogprobs(token, -1.0, []))
        pieces.append(one.take(token))
    return pieces


@pytest.mark.parametrize("ends_with", ["stop token", "limit"])
def test_the_end_of_a_text_has_what_was_held_back(tokenizer, ends_with):
    """A part of a character, and the start of a stop string."""
    ids = [*tokenizer("The").input_ids, *tokenizer("é").input_ids[:1]]
    if ends_with == "stop token":
        ids.append(tokenizer.eos_token_id)
    pieces = take_all(choice(tokenizer, len(ids), stops=("The end",)), ids)
    assert [piece.text for piece in pieces[:-1]] == [""] * (len(ids) - 1)
    assert pieces[-1].text == "The\ufffd"
    assert pieces[-1].finish_reason == ("stop" if ends_with == "stop token" else "length")


def test_the_stop_token_has_no_text_and_is_not_counted(tokenizer):
    one = choice(tokenizer, 5, num_top_logprobs=0)
    pieces = take_all(one, [*tokenizer("A").input_ids, tokenizer.eos_token_id])
    assert [piece.text for piece in pieces] == ["A", ""] and one.num_completion_tokens == 1
    assert [len(piece.tokens) for piece in pieces] == [1, 0]


def test_a_stop_string_at_the_limit_is_a_stop(tokenizer):
    ids = tokenizer("A b").input_ids
    one = choice(tokenizer, len(ids), stops=("b",))
    assert "".join(piece.text for piece in take_all(one, ids)) == "A " and one.finish_reason == "stop"


def test_echo_comes_before_the_first_part_and_moves_the_offsets(tokenizer):
    one = choice(tokenizer, 3, echo="A fox", num_top_logprobs=0)
    pieces = take_all(one, tokenizer(" a").input_ids + tokenizer("b").input_ids)
    assert "".join(piece.text for piece in pieces) == "A fox ab"
    assert [scored.offset for piece in pieces for scored in piece.tokens] == [5, 7]
