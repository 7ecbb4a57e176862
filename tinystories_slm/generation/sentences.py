"""Sentence boundaries in generated text."""

import re

_END = re.compile("[.!?…]+[\"'”\u2019)\\]]*(?=\\s|$)")
_ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "jr", "sr", "prof", "vs", "etc", "mt"}
_LAST_WORD = re.compile(r"(\w+)\.$")


def end_of_last_sentence(text: str, *, confirmed_only: bool = False) -> int:
    """Return the index after the last complete sentence of `text`; 0 if `text` has no complete sentence.

    These do not end a sentence: the period of an abbreviation (Mr.) or initial (J.), a mark before a
    lower-case word (`"Hi!" she said`), and a mark inside an open quotation (`"Hi! How are`).

    With `confirmed_only`, an end counts only if the start of another sentence follows it. Text that is
    appended later cannot change such an end, so a stream can emit it.
    """
    ends = [match for match in _END.finditer(text) if _is_end(text, match, confirmed_only)]
    return ends[-1].end() if ends else 0


def _is_end(text: str, match: re.Match[str], confirmed_only: bool) -> bool:
    following = text[match.end() :].lstrip()[:1]
    if following.islower() or (confirmed_only and not following):
        return False
    word = _LAST_WORD.search(text[max(0, match.start() - 20) : match.start() + 1])
    if word and (
        word[1].lower() in _ABBREVIATIONS or (len(word[1]) == 1 and word[1].isupper() and word[1] != "I")
    ):
        return False
    return not _is_quotation_open(text, match.end())


def _is_quotation_open(text: str, end: int) -> bool:
    """Whether the last quotation mark of the paragraph before `end` is an opening one.

    Only the last mark decides: if marks were counted, one missing mark would invert all later ones.
    """
    paragraph = text[text.rfind("\n", 0, end) + 1 : end]
    at = max(paragraph.rfind(mark) for mark in '"“”')
    if at < 0 or paragraph[at] == "”":
        return False
    return paragraph[at] == "“" or at == 0 or paragraph[at - 1] in " \t(—"
