"""Blocks of TinyStories-Instruct: lines that describe a story, a line `Story:`, and the story.

Features: Dialogue, BadEnding
Words: quit, oak, gloomy
Summary: Sara and Ben stay in the park until it is dark.
Random sentence: The wind was cold.
Story:

Once upon a time ...

Each line above `Story:` may be absent, and their order varies.
"""

import re
from dataclasses import dataclass

FEATURES = ("BadEnding", "Conflict", "Dialogue", "Foreshadowing", "MoralValue", "Twist")
"""Features of the published blocks."""
_FIELD = re.compile(r"^(Features|Words|Summary|Random sentence|Story):", re.MULTILINE)
BLOCK_START = r"^\s*(Features|Words|Summary|Random sentence|Story):"
"""Regular expression (RE2) of the start of every block, for a fast search in many texts."""
_LISTS = ("Features", "Words")


@dataclass(frozen=True, kw_only=True)
class InstructBlock:
    """A story, and what its prompt states about it.

    Raises:
        ValueError: the block could not be read back: a value of the prompt is empty or contains a line end or
            several blanks in a row, or a word or feature contains a comma.
    """

    words: tuple[str, ...] = ()
    """Words that the story uses."""
    features: tuple[str, ...] = ()
    """Features of the story, such as those of `FEATURES`."""
    summary: str | None = None
    random_sentence: str | None = None
    """A sentence that the story contains."""
    story: str = ""

    def __post_init__(self) -> None:
        for value in (*self.words, *self.features, self.summary, self.random_sentence):
            if value is not None and (not value or value != _on_one_line(value)):
                raise ValueError(
                    f"{value!r} must be text on one line, without blanks at its ends or in a row"
                )
        if with_comma := [value for value in (*self.words, *self.features) if "," in value]:
            raise ValueError(f"{with_comma[0]!r} must not contain a comma")


def parse_block(text: str) -> InstructBlock | None:
    """Parse a block; return None for a text without one.

    The lines before the first line that starts with `Story:` are the prompt. All that follows is the story,
    without white space at its ends. Line ends may be CRLF. A summary and a random sentence may continue on
    further lines. The values of repeated lines are joined.
    """
    found = _find_prompt(text)
    if found is None:
        return None
    fields, start = found
    words, features = (
        tuple(item for part in fields.get(name, "").split(",") if (item := _on_one_line(part)))
        for name in ("Words", "Features")
    )
    return InstructBlock(
        words=words,
        features=features,
        summary=_on_one_line(fields.get("Summary", "")) or None,
        random_sentence=_on_one_line(fields.get("Random sentence", "")) or None,
        story=text[start:].strip(),
    )


def prompt_text(block: InstructBlock) -> str:
    """Return the text of the block before its story: it ends with `Story:`."""
    fields = {
        "Features": ", ".join(block.features),
        "Words": ", ".join(block.words),
        "Summary": block.summary,
        "Random sentence": block.random_sentence,
    }
    lines = [f"{name}: {value}\n" for name, value in fields.items() if value]
    return "".join(lines) + "Story:"


def format_block(block: InstructBlock) -> str:
    """Return the text of the block: `prompt_text(block)`, an empty line and the story."""
    return f"{prompt_text(block)}\n\n{block.story.strip()}".rstrip()


def story_start(text: str) -> int | None:
    """Return the index of the character behind the `Story:` that ends the prompt; None without a block."""
    found = _find_prompt(text)
    return None if found is None else found[1]


def _find_prompt(text: str) -> tuple[dict[str, str], int] | None:
    """Return the values of the prompt's lines by name, and `story_start`; None for a text without a block.

    A block starts with one of the lines. `Story:` without other lines stands alone on its line; a story after
    it on the same line is a plain story with a heading.
    """
    body = text.lstrip()
    if _FIELD.match(body) is None:
        return None
    fields: dict[str, str] = {}
    lines = _FIELD.finditer(body)
    line = next(lines)
    while line[1] != "Story":
        following = next(lines, None)
        if following is None:
            return None
        value = body[line.end() : following.start()].strip()
        if line[1] in _LISTS and "\n" in value:
            return None
        separator = ", " if line[1] in _LISTS else " "
        fields[line[1]] = separator.join(filter(None, (fields.get(line[1]), value)))
        line = following
    if not fields and body[line.end() :].partition("\n")[0].strip():
        return None
    return fields, len(text) - len(body) + line.end()


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
