"""Pieces of whole characters, whatever the tokens are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data.sources.file_formats import END_OF_TEXT
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.generation.detokenizer import IncrementalDetokenizer

BACKEND = train_bpe(["Once upon a time there was a fox."] * 3, 280)
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=BACKEND, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def pieces_of(prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(TOKENIZER, prompt)
    return [*(detokenizer.add(token) for token in ids), detokenizer.flush()]


@given(st.text(max_size=12), st.text(max_size=30))
def test_pieces_of_a_text_split_no_character(prompt, text):
    ids = TOKENIZER(text).input_ids
    pieces = pieces_of(TOKENIZER(prompt).input_ids, ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 279), max_size=12), st.lists(st.integers(1, 279), max_size=30))
def test_pieces_of_any_tokens_are_the_end_of_their_text(prompt, ids):
    """Also of tokens that are no UTF-8, and of prompts that end inside a character."""
    text = TOKENIZER.decode(prompt + ids, skip_special_tokens=True)
    pieces = pieces_of(prompt, ids)
    assert text.endswith("".join(pieces))
    before = pieces_of([], prompt)
    if not before[-1]:  # the prompt ends with a whole character
        assert "".join(before) + "".join(pieces) == text


def test_a_character_is_complete_with_its_last_byte():
    ids = TOKENIZER("🦊!").input_ids
    assert pieces_of([], ids) == ["", "", "", "🦊", "!", ""]
    assert pieces_of(ids[:2], ids[2:]) == ["", "🦊", "!", ""]
    assert pieces_of([], ids[:2]) == ["", "", "\ufffd"]


def test_special_tokens_have_no_text():
    end = TOKENIZER.eos_token_id
    assert pieces_of([end], [*TOKENIZER("fox").input_ids, end])[-2:] == ["", ""]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_the_length_of_the_prompt_changes_no_piece(length):
    prompt, ids = TOKENIZER("a fox " * 40).input_ids[:length], TOKENIZER(" there wäs").input_ids
    assert pieces_of(prompt, ids) == pieces_of(prompt[:1], ids)
