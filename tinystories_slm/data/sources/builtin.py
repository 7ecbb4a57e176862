"""The built-in corpus as a source: stories that `tinystories_slm.grammar` generates."""

from functools import partial

from tinystories_slm import grammar
from tinystories_slm.data.sources.story_source import Splits, StorySource

BUILTIN = "builtin"
"""Value of `data.source` for the built-in corpus."""
BUILTIN_STORIES = 40_000
"""Number of its stories if `data.max_stories` is null."""


class BuiltinSource(StorySource):
    """The built-in corpus; its revision is `grammar VERSION`."""

    is_builtin_corpus = True
    label = "the built-in corpus of tinystories_slm"
    license = "MIT, like the package that generates them"

    @classmethod
    def matches(cls, value: str) -> bool:
        return value == BUILTIN

    def resolve_revision(self, requested: str | None) -> str:
        return f"grammar {grammar.VERSION}"

    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
        return {"train": partial(grammar.generate_corpus, max_stories or BUILTIN_STORIES, seed=0)}

    def folder_name(self) -> None:
        return None
