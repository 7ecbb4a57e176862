"""Where the sentences of a story end."""

import re

_END = re.compile("[.!?…]+[\"'”\u2019)\\]]*(?=\\s|$)")
_NO_END = {"mr", "mrs", "ms", "dr", "st", "jr", "sr", "prof", "vs", "etc", "mt"}
_LAST_WORD = re.compile(r"(\w+)\.$")


def end_of_last_sentence(text: str, *, certain: bool = False) -> int:
    """The number of characters up to the end of the last full sentence of `text`; 0 if there is none.

    No end are: the stop of an abbreviation (Mr.) or initial (J.), one that a lower-case word follows
    (`"Hi!" she said`), one inside a quotation that is still open (`"Hi! How are`).

    With `certain` only ends that the beginning of another sentence confirms count: whatever `text` goes
    on with, they stay.
    """
    ends = [match for match in _END.finditer(text) if _is_end(text, match, certain)]
    return ends[-1].end() if ends else 0


def _is_end(text: str, match: re.Match[str], certain: bool) -> bool:
    following = text[match.end() :].lstrip()[:1]
    if following.islower() or (certain and not following):
        return False
    word = _LAST_WORD.search(text[max(0, match.start() - 20) : match.start() + 1])
    if word and (word[1].lower() in _NO_END or (len(word[1]) == 1 and word[1].isupper() and word[1] != "I")):
        return False
    return not _quotation_open(text, match.end())


def _quotation_open(text: str, end: int) -> bool:
    """Whether the last quotation mark of the paragraph before `end` opens one.

    The last one alone decides, so a mark that the model forgot does not turn all that follow around.
    """
    paragraph = text[text.rfind("\n", 0, end) + 1 : end]
    at = max(paragraph.rfind(mark) for mark in '"“”')
    if at < 0 or paragraph[at] == "”":
        return False
    return paragraph[at] == "“" or at == 0 or paragraph[at - 1] in " \t(—"
