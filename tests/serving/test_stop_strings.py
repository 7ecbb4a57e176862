from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.serving.stop_strings import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """Texts that are sent, and whether a stop string ended them."""
    filtered, sent = StopStrings(stops), []
    for piece in pieces:
        text, has_stopped = filtered.add(piece)
        sent.append(text)
        if has_stopped:
            return sent, True
    return [*sent, filtered.flush()], False


def test_a_stop_string_across_pieces_is_never_sent():
    assert run(["The end"], ["A fox. T", "he", " en", "d. More"]) == (["A fox. ", "", "", ""], True)


def test_held_text_is_sent_when_it_is_no_stop_string():
    assert run(["The end"], ["A fox. T", "he", " fox"]) == (["A fox. ", "", "The fox", ""], False)
    assert run(["The end"], ["A fox. The"]) == (["A fox. ", "The"], False)


def test_the_stop_string_that_is_complete_first_ends_the_text():
    assert run(["bcd", "c"], ["abcd"]) == (["ab"], True)
    assert run(["c", "bc"], ["abcd"]) == (["a"], True)


def test_a_stop_string_that_begins_again_inside_itself():
    assert run(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], True)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=5), max_size=9),
)
def test_pieces_do_not_change_the_text(stops, pieces):
    text = "".join(pieces)
    sent, has_stopped = run(stops, pieces)
    characters, has_stopped_too = run(stops, list(text))
    assert ("".join(sent), has_stopped) == ("".join(characters), has_stopped_too)
    assert has_stopped == any(stop in text for stop in stops)
    assert has_stopped or "".join(sent) == text
    assert not any(stop in "".join(sent) for stop in stops)
