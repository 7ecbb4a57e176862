"""`<|endoftext|>` between stories: removed at the ends of a text, and logged."""

import logging
from collections.abc import Iterable, Iterator
from functools import cache

from tinystories_slm.data.sources.file_formats import END_OF_TEXT

logger = logging.getLogger(__name__)


def strip_separators(text: str) -> str:
    """Remove each `<|endoftext|>` at the ends of `text`, with the white space around it."""
    while (bare := text.strip()).startswith(END_OF_TEXT) or bare.endswith(END_OF_TEXT):
        text = bare.removeprefix(END_OF_TEXT).removesuffix(END_OF_TEXT).strip()
    return text


def log_separators(texts: Iterable[str | None], source: str) -> Iterator[str | None]:
    """Yield `texts`; log once if a row begins or ends with `<|endoftext|>`, and once if it contains it."""
    for text in texts:
        if text is not None and END_OF_TEXT in text:
            story = strip_separators(text)
            if story != text:
                _log_once(source, "at the end of a row separates stories and is removed")
            if END_OF_TEXT in story:
                _log_once(source, "within a row is plain text; use one row for each story")
        yield text


@cache
def _log_once(source: str, message: str) -> None:
    logger.warning("%s: %s %s", source, END_OF_TEXT, message)
