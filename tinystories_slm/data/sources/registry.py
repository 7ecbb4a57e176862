"""Registry of the sources of stories, and the choice of the entry for a value of `data.source`."""

from tinystories_slm.data.sources.builtin import BuiltinInstructSource, BuiltinSource
from tinystories_slm.data.sources.hub import HubSource
from tinystories_slm.data.sources.local import LocalSource
from tinystories_slm.data.sources.mixture import MixtureSource
from tinystories_slm.data.sources.named_source import NamedSource
from tinystories_slm.data.sources.story_source import StorySource

SOURCES: dict[str, type[StorySource]] = {
    "hub": HubSource,
    "local": LocalSource,
    "builtin": BuiltinSource,
    "builtin-instruct": BuiltinInstructSource,
    "named": NamedSource,
    "mixture": MixtureSource,
}
"""Sources by kind; docs/extending.md adds one. The last added that matches is chosen; `hub` matches all."""


def find_source(value: str, subset: str | None = None, *, is_streamed: bool = False) -> StorySource:
    """Return the source for `value` of `data.source` and `subset` of `data.subset`; it may not exist."""
    kinds = reversed(SOURCES.values())
    source = _create(next(kind for kind in kinds if kind.matches(value)), value, subset)
    source.is_streamed = is_streamed
    return source


def find_recorded_source(value: str, revision: object, subset: str | None = None) -> StorySource | None:
    """Return the source that was recorded as `value` at `revision`; None if it is of no known kind.

    `revision` comes from a file, so it may be of any type.
    """
    recorded = revision if isinstance(revision, str) else ""
    kinds = reversed(SOURCES.values())
    kind = next((kind for kind in kinds if kind.matches_record(value, recorded)), None)
    return None if kind is None else _create(kind, value, subset)


def _create(kind: type[StorySource], value: str, subset: str | None) -> StorySource:
    source = kind(value)
    source.subset = subset
    return source
