"""Published sets of stories that have a name of their own; docs/data.md states where each fact comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

_CDLA = "[CDLA-Sharing-1.0](https://cdla.dev/sharing-1-0/)"
_TINYSTORIES = "Eldan and Li, TinyStories, 2023, arXiv:2305.07759"
_TINYSTORIES_COMMIT = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"


@dataclass(frozen=True, kw_only=True)
class StoryFiles:
    """Files of one split, and the rows of them that belong to it."""

    files: tuple[str, ...]
    """Patterns of paths in the repository: `*` and `?` stay within a folder."""
    members: tuple[str, ...] = ()
    """Patterns of paths in the tar archives that `files` are; empty if they are no archives."""
    first_row: int = 0
    """Number of the first row, over all files; 0 is the first."""
    end_row: int | None = None
    """Number of the row after the last one; null for all."""

    @property
    def selects_rows(self) -> bool:
        """Whether the split is a part of the rows of its files."""
        return self.first_row > 0 or self.end_row is not None


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A published set of stories on the Hub."""

    repository: str
    revision: str
    """Commit that is read unless `data.revision` names another one."""
    splits: Mapping[str, StoryFiles]
    text_column: str = "text"
    """Column or key that holds the story; text files have none."""
    split_rule: str
    """Origin of the validation stories, in words."""
    license: str | None
    """License in Markdown; None if the page of the dataset states none."""
    citation: str
    is_whole_dataset: bool = False
    """Whether the Hub id without a name selects the same stories."""


NAMED_SETS: dict[str, NamedSet] = {
    "tinystories": NamedSet(
        repository="roneneldan/TinyStories",
        revision=_TINYSTORIES_COMMIT,
        splits={
            "train": StoryFiles(files=("data/train-*.parquet",)),
            "validation": StoryFiles(files=("data/validation-*.parquet",)),
        },
        split_rule="its own validation split",
        license=_CDLA,
        citation=_TINYSTORIES,
        is_whole_dataset=True,
    ),
    "tinystories-v2": NamedSet(
        repository="roneneldan/TinyStories",
        revision=_TINYSTORIES_COMMIT,
        splits={
            "train": StoryFiles(files=("TinyStoriesV2-GPT4-train.txt",)),
            "validation": StoryFiles(files=("TinyStoriesV2-GPT4-valid.txt",)),
        },
        split_rule="its own validation file",
        license=_CDLA,
        citation=_TINYSTORIES,
    ),
    "tinystories-all": NamedSet(
        repository="roneneldan/TinyStories",
        revision=_TINYSTORIES_COMMIT,
        splits={
            "train": StoryFiles(
                files=("TinyStories_all_data.tar.gz",), members=("data0[1-9].json", "data[1-9][0-9].json")
            ),
            "validation": StoryFiles(files=("TinyStories_all_data.tar.gz",), members=("data00.json",)),
        },
        text_column="story",
        split_rule="its first file, data00.json, as in llama2.c",
        license=_CDLA,
        citation=_TINYSTORIES,
    ),
    "tinystories-clean": NamedSet(
        repository="karpathy/tinystories-gpt4-clean",
        revision="0397e27157956705a0260709da3095bb9c43d6a7",
        splits={
            "train": StoryFiles(files=("tinystories_gpt4_clean.parquet",), first_row=20_000),
            "validation": StoryFiles(
                files=("tinystories_gpt4_clean.parquet",), first_row=10_000, end_row=20_000
            ),
            "test": StoryFiles(files=("tinystories_gpt4_clean.parquet",), end_row=10_000),
        },
        split_rule="rows 10,000 to 19,999; rows 0 to 9,999 are the test split",
        license=_CDLA,
        citation=f"{_TINYSTORIES}; cleaned by Karpathy",
    ),
    "tinystories-instruct": NamedSet(
        repository="roneneldan/TinyStoriesInstruct",
        revision="ee050ed1f8720795be342921335e821856a2b42e",
        splits={
            "train": StoryFiles(files=("TinyStories-Instruct-train.txt",)),
            "validation": StoryFiles(files=("TinyStories-Instruct-valid.txt",)),
        },
        split_rule="its own validation file",
        license=None,
        citation=_TINYSTORIES,
        is_whole_dataset=True,
    ),
    "simplestories": NamedSet(
        repository="SimpleStories/SimpleStories",
        revision="e63b8adc3b1a1bdc7cac5b500d150b71346b0628",
        splits={
            "train": StoryFiles(files=("data/train-*.parquet",)),
            "test": StoryFiles(files=("data/test-*.parquet",)),
        },
        text_column="story",
        split_rule="held out of the training split by data.validation_fraction; it has a test split",
        license="MIT",
        citation="Finke et al., Parameterized Synthetic Text Generation with SimpleStories, 2025, "
        "arXiv:2504.09184",
        is_whole_dataset=True,
    ),
}
"""Named sets by the value of `data.source`; names are lower-case and contain no `/`."""


def suggest_name(value: str) -> str:
    """Return `; did you mean NAME?` for a value that is nearly the name of a set; otherwise nothing."""
    near = get_close_matches(value.lower(), [*NAMED_SETS, "builtin", "builtin-instruct"], n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def format_named_sets() -> str:
    """Return the table that `download_data --list` prints, one paragraph for each set."""
    return "\n\n".join(_format_set(name, named) for name, named in NAMED_SETS.items())


def _format_set(name: str, named: NamedSet) -> str:
    files = {
        f"{pattern}/{member}" if member else pattern: None
        for split in named.splits.values()
        for pattern in split.files
        for member in split.members or ("",)
    }
    rows = {
        "dataset": f"https://huggingface.co/datasets/{named.repository}",
        "revision": named.revision,
        "files": ", ".join(files),
        "column": named.text_column,
        "validation": named.split_rule,
        "license": named.license or "not stated on its page",
        "citation": named.citation,
    }
    return "\n".join([name, *(f"  {key:<10}  {value}" for key, value in rows.items())])
