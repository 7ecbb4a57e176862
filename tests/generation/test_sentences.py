import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.generation.sentences import end_of_last_sentence


@pytest.mark.parametrize(
    ("kept", "cut"),
    [
        ("The fox ran.", " He was"),
        ("The fox ran!", ""),
        ("", "The fox ran"),
        ("The fox ran.", ' "Hi!" she said and'),
        ('"Hi!" she said.', " Then"),
        ('He said, "Hi!"', " Then the"),
        ("He ran.", ' "Hi! How are'),
        ('He ran. "Hi! How are you?"', " Then"),
        ("He ran.", " “Hi! How are"),
        ("“Hi! How are you?”", " Then"),
        ("He ran.", " Mr. Owl and Mrs. Owl saw Dr."),
        ("So did I.", " Then"),
        ("He ran.", " J. R. Fox"),
        ("He ran.", " It cost 3.50 to"),
        ("Wait...", " What is"),
        ("He ran.", " Wait... there is"),
        ("(He ran.)", " Then"),
        ('One said "Hi!\nHe ran.', " A"),  # a missing closing mark affects its paragraph only
        ('One said "Hi!" and left." He ran.', " A"),  # and only the text before the next mark
        ("He ran.\n\nShe ran.", "\n\nThen"),
        ("'Hi!' said he.", " Then"),
    ],
)
def test_end_of_last_sentence_finds_the_last_complete_one(kept, cut):
    assert (kept + cut)[: end_of_last_sentence(kept + cut)] == kept


@given(st.text('aA.!?" \n”“\u2019', max_size=40), st.text('aA.!?" \n”“\u2019', max_size=10))
def test_appended_text_does_not_change_a_confirmed_end(text, more):
    confirmed = end_of_last_sentence(text, confirmed_only=True)
    assert 0 <= confirmed <= end_of_last_sentence(text) <= len(text)
    assert confirmed <= end_of_last_sentence(text + more, confirmed_only=True)


def test_start_of_the_next_sentence_confirms_an_end():
    assert end_of_last_sentence("He ran.", confirmed_only=True) == 0
    assert end_of_last_sentence("He ran. ", confirmed_only=True) == 0
    assert end_of_last_sentence("He ran. T", confirmed_only=True) == 7
