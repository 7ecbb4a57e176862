"""Escape text for Markdown, so that it is rendered literally."""

import re


def escape_markdown(text: str) -> str:
    """Return `text` on one line, without emphasis, links, tables, code, HTML, formulas or headings."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    text = re.sub(r"^([-+#=>])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def quote_markdown(text: str) -> str:
    """Return the lines of `text` as a block quote."""
    return "\n".join(f"> {escape_markdown(line)}".rstrip() for line in text.split("\n"))


def escape_code(text: str) -> str:
    """Return `text` for use between two backticks; a backtick cannot be escaped there."""
    return " ".join(text.replace("`", "'").split())
