"""The language of the project: the worst patterns stay out of docstrings, comments, messages and docs.

A machine does not tell, say, ask or refuse; the field has words for what it does (CONTRIBUTING.md). The texts
of the built-in stories are not checked.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

BANNED = {
    r"\banew\b": "again",
    r"\bwhoever\b": "a user who",
    r"\bnobody\b": "no user, no process",
    r"\bat hand\b": "available",
    r"\bcome by\b": "measured, computed",
    r"\bmade ready\b": "prepared",
    r"\btold\b": "generated, logged, specified",
    r"\btells\b": "generates, logs, shows",
    r"\brefuses?\b": "rejects, raises",
    r"\brefused\b": "rejected",
    r"\bthere is no doing without\b": "must be set",
}
DOCSTRING_OPENINGS = re.compile(r"^(What|Of|How)\b")

# Files that hold a pattern for a reason, or that are not rewritten yet; the list only gets shorter.
ALLOWED: dict[str, set[str]] = {}


def python_files() -> list[Path]:
    package = sorted((ROOT / "tinystories_slm").rglob("*.py"))
    notebooks = [*(ROOT / "notebooks").glob("*.py"), *(ROOT / "notebooks").glob("*/*.py")]
    return [path for path in package + sorted(notebooks) if "grammar/plots" not in path.as_posix()]


def documents() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "model_card.md",
        ROOT / "notebooks/README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]


def prose_of(path: Path) -> str:
    """Comments and strings of a Python file; a document without its code blocks and quotations."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        return re.sub(r"(?m)^>.*$", "", text)
    kinds = (tokenize.COMMENT, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in kinds)


def docstrings_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text]


@pytest.mark.parametrize(
    "path", [*python_files(), *documents()], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_prose_is_plain(path):
    text, name = prose_of(path), path.relative_to(ROOT).as_posix()
    found = {
        f"{match[0]!r}: {instead}"
        for pattern, instead in BANNED.items()
        for match in re.finditer(pattern, text)
        if match[0] not in ALLOWED.get(name, set())
    }
    assert not found, f"{name}: {found}"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_open_with_an_imperative_or_a_noun(path):
    openings = [text.splitlines()[0] for text in docstrings_of(path) if DOCSTRING_OPENINGS.match(text)]
    assert not openings


def test_no_class_name_is_used_twice():
    names: dict[str, list[str]] = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    twice = {name: paths for name, paths in names.items() if len(paths) > 1}
    assert not twice
