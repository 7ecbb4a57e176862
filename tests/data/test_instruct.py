"""Blocks of TinyStories-Instruct: what is one, its parts, and the way back to its text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.data.filters.cleaning import has_prompt
from tinystories_slm.data.instruct import (
    FEATURES,
    InstructBlock,
    format_block,
    parse_block,
    prompt_text,
    story_start,
)

PUBLISHED = (
    "Features: Dialogue, BadEnding\nWords: quit, oak, gloomy\nSummary: Sara and Ben stay in the park.\n"
    "Random sentence: The wind was cold.\nStory: \n\nOnce upon a time.\n\nThe end.\n"
)
BLOCK = InstructBlock(
    words=("quit", "oak", "gloomy"),
    features=("Dialogue", "BadEnding"),
    summary="Sara and Ben stay in the park.",
    random_sentence="The wind was cold.",
    story="Once upon a time.\n\nThe end.",
)


TEXT = st.text() | st.text(" aB,:\n\r\x85\u2028Story:")
LINE = TEXT.map(lambda text: " ".join(text.split())).filter(bool)
WORD = TEXT.map(lambda text: " ".join(text.replace(",", "").split())).filter(bool)

blocks = st.builds(
    InstructBlock,
    words=st.lists(WORD, max_size=4).map(tuple),
    features=st.lists(st.sampled_from(FEATURES), max_size=3).map(tuple),
    summary=st.none() | LINE,
    random_sentence=st.none() | LINE,
    story=TEXT.map(str.strip),
)


def test_published_block_is_parsed_in_any_order_and_line_end():
    assert parse_block(PUBLISHED) == BLOCK
    features, words, summary, sentence, rest = PUBLISHED.split("\n", 4)
    for text in (
        "\n".join([sentence, summary, words, features, rest]),
        PUBLISHED.replace("\n", "\r\n").replace("time.\r\n\r\n", "time.\n\n"),
        "\n " + PUBLISHED,
        PUBLISHED.replace("\n", "\n\n", 4),
        PUBLISHED.replace("stay in", "stay\nin"),
        PUBLISHED.replace("Words: quit, oak", "Words: quit,\nWords: oak"),
    ):
        assert parse_block(text) == BLOCK, text
    assert format_block(BLOCK) == PUBLISHED.replace("Story: \n", "Story:\n").rstrip()


@given(blocks)
def test_block_survives_the_round_trip(block):
    text = format_block(block)
    assert parse_block(text) == block
    assert parse_block(text.replace("\n", "\r\n")).words == block.words
    prompt = prompt_text(block)
    assert text.startswith(prompt) and prompt.endswith("Story:")
    assert story_start(text) == len(prompt)


@given(st.text("aB,: \n\r") | st.lists(st.sampled_from(re.split("(?<=[: \n])", PUBLISHED))).map("".join))
def test_any_text_is_parsed_or_is_no_block(text):
    block, start = parse_block(text), story_start(text)
    assert (block is None) == (start is None)
    if block is not None:
        assert text[:start].endswith("Story:") and text[start:].strip() == block.story
        assert parse_block(format_block(block)) == block


@pytest.mark.parametrize(
    ("text", "story"),
    [
        ("Words: a\nStory:\n\nHe told a story.\nStory: the end.\n", "He told a story.\nStory: the end."),
        ("Words:\nStory:\n\nOne day.", "One day."),
        ("Words: a\nStory:", ""),
        ("Story:\n\nOne day.", "One day."),
        ("Story:", ""),
        ("Words: a\nStory: One day.", "One day."),
        ("", None),
        ("Once upon a time.\nStory:\n\nOne day.", None),
        ("Story: One day.", None),
        ("Words: a\nOne day.", None),
        ("Words: a\nOnce upon a time.\nStory:\nOne day.", None),
        ("words: a\nstory:\nOne day.", None),
    ],
)
def test_definition_of_a_block(text, story):
    block = parse_block(text)
    assert (None if block is None else block.story) == story
    if "Story:" in text:  # the rule for leaked prompts has the same definition
        assert has_prompt(text) == (block is None or "Story: the end." in text)


@pytest.mark.parametrize(
    "part",
    [
        {"words": ("a, b",)},
        {"words": ("",)},
        {"words": (" a",)},
        {"features": ("Twist\n",)},
        {"summary": "One\nStory:"},
        {"summary": ""},
        {"random_sentence": "two  blanks"},
    ],
)
def test_block_that_cannot_be_read_back_is_rejected(part):
    with pytest.raises(ValueError, match="must"):
        InstructBlock(**part)
