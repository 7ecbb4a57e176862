"""Buckets by position and by length: every token and every byte of the text in one of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.evaluation.breakdown import scores_by_length, scores_by_position, token_ends


@given(text=st.text(max_size=60))
def test_tokens_end_in_order_and_the_last_at_the_end_of_the_text(tokenizer, text):
    [ids] = encode_stories(tokenizer, [text])
    [ends] = token_ends(tokenizer, [text])
    assert len(ends) == len(ids)
    assert (np.diff(ends) >= 0).all()
    assert not len(ends) or ends[-1] == len(text.encode("utf-8"))


def test_token_ends_count_the_bytes_of_whole_characters(tokenizer):
    [ends] = token_ends(tokenizer, ["é🦊a"])
    assert ends.tolist() == [2, 2, 6, 6, 6, 6, 7]  # one token per byte; é has 2, the fox 4


def test_buckets_by_position_hold_every_token_once():
    ends = [np.array([60, 120, 210]), np.array([], dtype=np.int64), np.array([1700])]
    buckets = scores_by_position(np.array([1.0, 2.0, 4.0, 8.0]), ends, is_lossy=False)
    assert [(b["from_byte"], b["to_byte"], b["num_tokens"], b["num_bytes"]) for b in buckets] == [
        (0, 100, 3, 1820), (100, 200, 1, 90),
    ]  # fmt: skip
    assert [b["loss"] for b in buckets] == pytest.approx([11 / 3, 4.0])
    assert buckets[1]["bits_per_byte"] == pytest.approx(4 / math.log(2) / 90)
    lossy = scores_by_position(np.array([1.0, 2.0, 4.0, 8.0]), ends, is_lossy=True)
    assert not any("bits_per_byte" in bucket for bucket in lossy)


def test_buckets_by_length_hold_every_story_once():
    sizes = np.array([0, 249, 250, 9000])
    nats, tokens = np.array([0.0, 5.0, 6.0, 7.0]), np.array([0, 10, 10, 10])
    buckets = scores_by_length(nats, tokens, sizes, is_lossy=False)
    assert [(b["from_byte"], b["to_byte"], b["num_stories"]) for b in buckets] == [
        (0, 250, 2), (250, 500, 1), (4000, None, 1),
    ]  # fmt: skip
    assert [b["loss"] for b in buckets] == pytest.approx([0.5, 0.6, 0.7])
