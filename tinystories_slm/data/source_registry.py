"""Registry of the sources of stories, and the choice of the entry for a value of `data.source`."""

from tinystories_slm.data.builtin import BuiltinSource
from tinystories_slm.data.hub import HubSource
from tinystories_slm.data.local import LocalSource
from tinystories_slm.data.story_source import StorySource

SOURCES: dict[str, type[StorySource]] = {
    "hub": HubSource,
    "local": LocalSource,
    "builtin": BuiltinSource,
}
"""Sources by kind; docs/extending.md adds one. The last added that matches is chosen; `hub` matches all."""


def find_source(value: str) -> StorySource:
    """Return the source for `value` of `data.source`; whether it exists is not checked."""
    return next(kind(value) for kind in reversed(SOURCES.values()) if kind.matches(value))


def find_recorded_source(value: str, revision: object) -> StorySource | None:
    """Return the source that was recorded as `value` at `revision`; None if it is of no known kind.

    `revision` comes from a file, so it may be of any type.
    """
    recorded = revision if isinstance(revision, str) else ""
    kinds = reversed(SOURCES.values())
    return next((kind(value) for kind in kinds if kind.matches_record(value, recorded)), None)
