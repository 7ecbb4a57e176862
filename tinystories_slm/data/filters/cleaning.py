"""Cleaning of stories: rules with names, each of which repairs a story or drops it."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TypedDict

from tinystories_slm.data.instruct import story_start
from tinystories_slm.errors import UserError

SAMPLE_STORIES = 1000
"""Number of stories that `choose_rules` reads."""
_MAX_DROPPED_SHARE = 0.2
_MAX_EXAMPLES = 3
_EXAMPLE_CHARS = 200
_MIN_WORDS = 10
# The lowest share in 22,093 stories of TinyStories is 0.15; stories in six other languages have 0.
_MIN_ENGLISH_SHARE = 0.05

_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'"),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("\u2014\u2015", " - "),
        "\u2026": "...",
        **dict.fromkeys(
            "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f", " "
        ),
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff"),
    }
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BLANKS = re.compile(r"[ \t]+")
_BLANKS_AT_LINE_END = re.compile(r"[ \t]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{3,}")
_SEPARATOR = re.compile(
    r"<\|?/?(endoftext|im_start|im_end|eos|bos|pad|s|unk|end_of_text)\|?>|\[(EOS|BOS|PAD|SEP|CLS)\]"
)
_MARKUP = re.compile(
    r"</?(a|b|i|u|p|br|div|span|em|strong|h[1-6]|li|ul|ol|img|table|tr|td|html|body|code|pre)\b[^>\n]*>"
    r"|https?://|www\.\w|```|\*\*\w|^\#{1,6} |&(amp|quot|lt|gt|nbsp|#\d+);",
    re.MULTILINE | re.IGNORECASE,
)
_MARKS = ("<", "&", "`", "**", "#", "://", "www.")
_FIELD = re.compile(
    r"^(Words|Features|Summary|Random sentence|Story|Prompt|Instruction|Title):", re.MULTILINE
)
# Found by plain search: a pattern of alternatives takes as long as all other rules together.
_ANSWER_WORDS = ("as an ai language model", "as a language model", "i am an ai", "i'm an ai", "as an ai,")
_ANSWER_START = re.compile(
    r"((sure|certainly|of course)[,!.] here('s| is)\b|here('s| is) (a|the|your) (short |simple )?story\b"
    r"|(please )?write a (short |simple )?story\b|i('m| am) sorry, but (as|i (can't|cannot))\b)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
# None of them is a frequent word of another language in Latin letters.
_FUNCTION_WORDS = (
    "the and to of it she they his her him them you my your this that there with from were are be been had "
    "has have did said not very when then what who would could can went saw out up one"
)
_ENGLISH = frozenset(_FUNCTION_WORDS.split())
_ENGLISH_CHARS = 1000


class RuleCounts(TypedDict):
    """Counts of one rule, and examples of its work."""

    num_changed: int
    num_dropped: int
    examples: list[list[str]]
    """The first three stories that it changed or dropped: from the first changed character on, before and
    after; a dropped story has no second text."""


def repair_encoding(text: str) -> str | None:
    """Repair UTF-8 that was read as another encoding (`â€œ` for `“`), and remove control characters.

    Return None for a text with U+FFFD, which stands for a lost character.
    """
    if text.isascii():
        return _CONTROL.sub("", text)
    import ftfy  # only texts with such characters need it

    if ftfy.badness.is_bad(text):
        text = ftfy.fix_encoding(text)
    text = _CONTROL.sub("", text)
    return None if "\ufffd" in text else text


def normalize_punctuation(text: str) -> str:
    """Replace typographic quotes, dashes, dots and blanks by those of ASCII."""
    return text if text.isascii() else text.translate(_PUNCTUATION)


def normalize_blanks(text: str) -> str:
    """Keep one blank of a run, at most one empty line, and no white space at ends of lines or of the text."""
    if not any(run in text for run in ("  ", "\t", " \n", "\n\n\n")):
        return text.strip()
    return _BLANK_LINES.sub("\n\n", _BLANKS_AT_LINE_END.sub("", _BLANKS.sub(" ", text))).strip()


def has_separator(text: str) -> bool:
    """Whether a token that separates texts is spelled out within the text."""
    return ("<" in text or "[" in text) and _SEPARATOR.search(text) is not None


def has_markup(text: str) -> bool:
    """Whether the text contains tags or entities of HTML, addresses, or Markdown's headings, bold or code."""
    return any(mark in text for mark in _MARKS) and _MARKUP.search(text) is not None


def has_prompt(text: str) -> bool:
    """Whether the text contains the prompt that it was generated from, or a phrase of a chat model.

    Of a block of TinyStories-Instruct only the story counts: its prompt is a part of the block.
    """
    start = story_start(text)
    story = text if start is None else text[start:].lstrip()
    if _FIELD.search(story) is not None:
        return True
    lower = story.lower()
    return _ANSWER_START.match(story) is not None or any(words in lower for words in _ANSWER_WORDS)


def is_cut_off(text: str) -> bool:
    """Whether the last character ends no sentence: a letter, a digit, a comma, or an opening bracket."""
    last = text.rstrip()[-1:]
    return (
        not last
        or last in ",;:-&"
        or unicodedata.category(last)[0] in "LNM"
        or unicodedata.category(last) == "Ps"
    )


def is_short(text: str) -> bool:
    """Whether the text has fewer than 10 words."""
    return sum(1 for _ in islice(_WORD.finditer(text), _MIN_WORDS)) < _MIN_WORDS


def is_not_english(text: str) -> bool:
    """Whether fewer than one word in twenty of the first 1,000 characters is an English function word."""
    words = _WORD.findall(text[:_ENGLISH_CHARS].lower())
    return sum(word in _ENGLISH for word in words) < _MIN_ENGLISH_SHARE * len(words)


def _drop_if(is_faulty: Callable[[str], bool]) -> Callable[[str], str | None]:
    return lambda text: None if is_faulty(text) else text


RULES: dict[str, Callable[[str], str | None]] = {
    "encoding": repair_encoding,
    "punctuation": normalize_punctuation,
    "blanks": normalize_blanks,
    "separator": _drop_if(has_separator),
    "markup": _drop_if(has_markup),
    "prompt": _drop_if(has_prompt),
    "short": _drop_if(is_short),
    "cut_off": _drop_if(is_cut_off),
    "not_english": _drop_if(is_not_english),
}
"""Rules in their order: story -> the repaired story, or None for one that is dropped."""


def check_rules(names: Iterable[str]) -> None:
    """Check names that come from a file.

    Raises:
        UserError: this version has no such rule.
    """
    if unknown := [name for name in names if name not in RULES]:
        raise UserError(
            f"cleaning ({', '.join(unknown)}): must be rules of this version ({', '.join(RULES)}); "
            "install the version that prepared the data"
        )


def choose_rules(sample: Iterable[str]) -> list[str]:
    """Return the names of the rules that fit stories of which `sample` are the first ones.

    A rule that drops more than a fifth of them describes another kind of text: names, verses, or another
    language.
    """
    texts = list(islice(sample, SAMPLE_STORIES))
    limit = _MAX_DROPPED_SHARE * len(texts)
    return [name for name, rule in RULES.items() if sum(rule(text) is None for text in texts) <= limit]


@dataclass
class Cleaner:
    """Rules that clean a stream of stories, and what each of them did."""

    rules: Collection[str] = tuple(RULES)
    """Names of the rules that are applied."""
    on_drop: Callable[[str, str], None] = lambda text, rule: None
    """Called with each dropped story as it was read, and the name of the rule."""
    counts: dict[str, RuleCounts] = field(default_factory=dict)

    def num_dropped(self, rule: str) -> int:
        """Return how many stories `rule` dropped."""
        return self.counts[rule]["num_dropped"] if rule in self.counts else 0

    def clean(self, text: str) -> str | None:
        """Return the cleaned story, or None if a rule drops it; count what each rule did."""
        read = text
        for name, rule in RULES.items():
            if name not in self.rules:
                continue
            repaired = rule(text)
            if repaired != text:
                self._count(name, text, repaired)
            if repaired is None:
                self.on_drop(read, name)
                return None
            text = repaired
        return text

    def _count(self, rule: str, before: str, after: str | None) -> None:
        counts = self.counts.setdefault(rule, RuleCounts(num_changed=0, num_dropped=0, examples=[]))
        counts["num_changed" if after is not None else "num_dropped"] += 1
        if len(counts["examples"]) < _MAX_EXAMPLES:
            start = 0 if after is None else max(0, _first_difference(before, after) - 40)
            end = start + _EXAMPLE_CHARS
            counts["examples"].append([before[start:end]] + ([] if after is None else [after[start:end]]))


def _first_difference(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
