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
        ('One said "Hi!\nHe ran.', " A"),  # a new paragraph forgets a forgotten mark
        ('One said "Hi!" and left." He ran.', " A"),  # so does the next mark
        ("He ran.\n\nShe ran.", "\n\nThen"),
        ("'Hi!' said he.", " Then"),
    ],
)
def test_the_last_full_sentence(kept, cut):
    assert (kept + cut)[: end_of_last_sentence(kept + cut)] == kept


@given(st.text('aA.!?" \n”“\u2019', max_size=40), st.text('aA.!?" \n”“\u2019', max_size=10))
def test_what_is_certain_stays_whatever_follows(text, more):
    certain = end_of_last_sentence(text, certain=True)
    assert 0 <= certain <= end_of_last_sentence(text) <= len(text)
    assert certain <= end_of_last_sentence(text + more, certain=True)


def test_an_end_is_certain_once_another_sentence_begins():
    assert end_of_last_sentence("He ran.", certain=True) == 0
    assert end_of_last_sentence("He ran. ", certain=True) == 0
    assert end_of_last_sentence("He ran. T", certain=True) == 7
