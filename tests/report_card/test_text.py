"""Words, quotations and names of a story."""

import pytest

from tinystories_slm.report_card.text import (
    are_quotations_closed,
    count_repeated_ngrams,
    introduced_name,
    is_in_dictionary,
    names_with_positions,
    quoted_parts,
    split_sentences,
    split_words,
)


def test_words_and_sentences_of_a_story():
    text = 'Lily\u2019s cat ran. "Stop!" she said.\nIt didn\'t stop 3 times'
    assert split_words(text) == [
        "lily's",
        "cat",
        "ran",
        "stop",
        "she",
        "said",
        "it",
        "didn't",
        "stop",
        "times",
    ]
    assert len(split_sentences(text)) == 4
    assert split_words("...") == split_sentences("...") == []


def test_repeated_ngrams_are_counted_after_their_first_time():
    assert count_repeated_ngrams(list("abcdabcd"), 4) == (1, 5)
    assert count_repeated_ngrams(["a"], 4) == (0, 0)


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("No marks.", None),
        ('"Hi," he said. "Bye."', True),
        ('"Hi, he said.', False),
        ('"Hi,\n" he said.', False),  # each paragraph closes its own
        ("\u201cHi,\u201d he said.", True),
        ("\u201dHi,\u201c he said.", False),
    ],
)
def test_quotation_marks_close_in_their_paragraph(text, closed):
    assert are_quotations_closed(text) is closed
    assert bool(quoted_parts(text)) == (closed is True)


def test_names_stand_inside_a_sentence_and_are_no_forms_of_address():
    names = names_with_positions("A girl named Lily ran. The dog and Lily's Mom saw Tim. Then I slept.")
    assert names == {"Lily": [3, 8], "Tim": [11]}
    assert introduced_name("A girl named Lily and a boy called Tim") == "Lily"


def test_dictionary_has_words_and_lacks_misspelled_ones():
    assert [is_in_dictionary(word) for word in ("tummy", "girl's", "didn't", "playd", "wuz")] == [
        1,
        1,
        1,
        0,
        0,
    ]
