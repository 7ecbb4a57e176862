"""Any text as markdown that reads as the text itself."""

import re


def escaped(text: str) -> str:
    """`text`, on one line, without emphasis, links, tables, code, HTML, mathematics or headings."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    text = re.sub(r"^([-+#=>])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def quoted(text: str) -> str:
    """The lines of `text` as a block quotation."""
    return "\n".join(f"> {escaped(line)}".rstrip() for line in text.splitlines())


def code(text: str) -> str:
    """`text` for between two backticks, where a backtick cannot be escaped."""
    return " ".join(text.replace("`", "'").split())
