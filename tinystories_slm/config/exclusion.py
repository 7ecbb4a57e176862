"""Rules of `data.exclude`: which training stories a run leaves out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_STORIES = re.compile(r"story:([0-9]{1,12})(?:-([0-9]{1,12}))?")
_CLUSTER = re.compile(r"cluster:([0-9]{1,12})")
_PATTERN = "pattern:"


@dataclass(frozen=True)
class ExclusionRules:
    """Stories, by their row in raw/train.parquet, and texts that are left out."""

    rows: list[range] = field(default_factory=list)
    clusters: list[int] = field(default_factory=list)
    """Stories that are left out with all their near duplicates."""
    patterns: list[re.Pattern[str]] = field(default_factory=list)
    """Regular expressions that occur in the stories."""


def parse_exclusion(value: str | Sequence[str]) -> ExclusionRules:
    """Return the rules in `value` of `data.exclude`: one rule, or a list.

    Raises:
        ValueError: a rule is not valid.
    """
    rules = ExclusionRules()
    for rule in [value] if isinstance(value, str) else value:
        if match := _STORIES.fullmatch(rule):
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ValueError(f"{rule} must not end before it begins; correct it")
            rules.rows.append(range(first, last + 1))
        elif match := _CLUSTER.fullmatch(rule):
            rules.clusters.append(int(match[1]))
        elif rule.startswith(_PATTERN) and rule != _PATTERN:
            try:
                rules.patterns.append(re.compile(rule.removeprefix(_PATTERN)))
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{rule} must be a regular expression ({error}); correct it") from error
        else:
            raise ValueError(
                f"{rule} must be story:12, story:100-199, cluster:12 or pattern:REGEX; correct it"
            )
    return rules
