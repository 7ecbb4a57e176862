"""Mixtures: the training stories of several sources, interleaved by weight, and their validation stories."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import lcm
from pathlib import Path
from typing import TypedDict

from tinystories_slm.config.mixture import MixturePart, format_mixture, parse_mixture
from tinystories_slm.data.sources import folder_names
from tinystories_slm.data.sources.story_source import Splits, StorySource
from tinystories_slm.errors import UserError

logger = logging.getLogger(__name__)

_BETWEEN_REVISIONS = " + "


class PartCounts(TypedDict):
    """Stories that a part gave to each split."""

    source: str
    """Name of the part, without a path of this machine."""
    weight: int | float
    revision: str
    num_train_stories: int
    num_validation_stories: int


@dataclass(kw_only=True)
class OpenPart:
    """Splits of one part, and the stories that were read from it so far."""

    stride: int
    """Distance between its stories in the mixture; inversely proportional to the weight."""
    splits: Splits
    counts: PartCounts
    num_read_before: int = 0
    """Training stories that were read before a resumed stream or download starts, in its epoch."""
    num_validation_before: int = 0
    """Validation stories that were read before a resumed download starts."""

    def position_of_next(self) -> int:
        """Place of its next training story in the mixture, in the same unit for all parts."""
        return (2 * self.counts["num_train_stories"] + 1) * self.stride


class MixedSplits(dict[str, Callable[[], Iterable[str | None]]]):
    """Splits of a mixture; `iter_pairs` reads `train` and `validation` by the weights."""

    def __init__(self, parts: list[OpenPart]) -> None:
        names = dict.fromkeys(name for part in parts for name in part.splits)
        super().__init__({name: partial(_chain_split, parts, name) for name in names})
        self.parts = parts

    def part_counts(self) -> list[PartCounts]:
        """Return what `iter_pairs` yielded of each part."""
        return [part.counts for part in self.parts]

    def iter_pairs(
        self,
        read_part: Callable[..., Iterator[tuple[str, str]]],
        has_holdout: Callable[[Splits], bool],
        max_stories: int | None,
    ) -> Iterator[tuple[str, str]]:
        """Yield (split, story) of training and validation.

        Training story n of a part, counted from 0, has the place (n + 1/2) / weight, and the stories are read
        in the order of their places; of equal ones, that of the first part. The mixture ends where the next
        story is of a part that has no more, so no story is repeated.

        Args:
            read_part: Splits of a part, and names of those to read -> (split, story) pairs.
            has_holdout: Splits of a part -> whether its validation stories are held out of its training ones.
            max_stories: Number of stories read from the training splits; null for all.
        """
        streams = []
        for part in self.parts:
            part.counts["num_train_stories"] = part.num_read_before
            part.counts["num_validation_stories"] = part.num_validation_before
            names = ("train", "validation") if has_holdout(part.splits) else ("train",)
            streams.append(read_part(part.splits, *names))
        num_read = 0
        while max_stories is None or num_read < max_stories:
            index = min(range(len(self.parts)), key=lambda i: self.parts[i].position_of_next())
            pair = next(streams[index], None)
            if pair is None:
                self._log_end(self.parts[index])
                break
            num_read += 1
            yield _counted(self.parts[index], pair)
        for part in self.parts:
            if not has_holdout(part.splits) and "validation" in part.splits:
                for pair in read_part(part.splits, "validation"):
                    yield _counted(part, pair)

    def _log_end(self, ended: OpenPart) -> None:
        shares = [f"{part.counts['num_train_stories']:,} of {part.counts['source']}" for part in self.parts]
        logger.info(
            "the mixture ends where %s has no more stories, with %s; another weight changes this",
            ended.counts["source"],
            ", ".join(shares),
        )


def _counted(part: OpenPart, pair: tuple[str, str]) -> tuple[str, str]:
    part.counts["num_train_stories" if pair[0] == "train" else "num_validation_stories"] += 1
    return pair


def _chain_split(parts: list[OpenPart], name: str) -> Iterator[str | None]:
    return chain.from_iterable(part.splits[name]() for part in parts if name in part.splits)


class MixtureSource(StorySource):
    """Several sources; its revision is that of each part, in their order."""

    @classmethod
    def matches(cls, value: str) -> bool:
        return parse_mixture(value) is not None

    @property
    def parts(self) -> list[MixturePart]:
        """The parts that the value lists."""
        return parse_mixture(self.value) or []

    @property
    def sources(self) -> list[StorySource]:
        """The source of each part."""
        from tinystories_slm.data.sources.registry import find_source  # which imports this module

        return [find_source(part.name, part.subset, is_streamed=self.is_streamed) for part in self.parts]

    def check_exists(self) -> None:
        if self.subset is not None:
            raise UserError(f"data.subset ({self.subset}): cannot be set for a mixture; set subset of a part")
        for source in self.sources:
            if isinstance(source, MixtureSource):
                raise UserError(
                    f"data.source ({self.value}): a part cannot be a mixture; list its parts instead"
                )
            source.check_exists()
        for part, source in zip(self.parts, self.sources, strict=True):
            if part.revision is not None and not source.has_revisions:
                raise UserError(
                    f"data.source ({self.value}): revision of {part.name} is only for datasets on the Hub; "
                    "remove it"
                )

    def resolve_revision(self, requested: str | None) -> str:
        pairs = zip(self.parts, self.sources, strict=True)
        return _BETWEEN_REVISIONS.join(source.resolve_revision(part.revision) for part, source in pairs)

    def current_revision(self, recorded: str) -> str:
        pairs = zip(self.sources, self.split_revision(recorded), strict=True)
        return _BETWEEN_REVISIONS.join(source.current_revision(str(revision)) for source, revision in pairs)

    def split_revision(self, revision: str | None) -> list[str | None]:
        """Return the revision of each part; null for all if `revision` is null."""
        if revision is None:
            return [part.revision for part in self.parts]
        revisions = revision.split(_BETWEEN_REVISIONS)
        if len(revisions) != len(self.parts):
            raise UserError(f"data.source ({self.value}): {revision} is not a revision of this mixture")
        return list(revisions)

    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> MixedSplits:
        weights = [part.exact_weight for part in self.parts]
        scale = lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        parts = []
        for index, (part, source) in enumerate(zip(self.parts, self.sources, strict=True)):
            resolved = self.split_revision(revision)[index]
            splits = source.open_splits(
                resolved if source.has_revisions else None, part.text_column or text_column, max_stories
            )
            if "train" not in splits:
                available = ", ".join(map(repr, sorted(splits)))
                raise UserError(
                    f"data.source ({self.value}): {part.name} has no split 'train', only {available}; "
                    "remove this part"
                )
            counts = PartCounts(
                source=source.public_name(),
                weight=part.weight,
                revision=resolved or "",
                num_train_stories=0,
                num_validation_stories=0,
            )
            parts.append(OpenPart(stride=lcm(*whole) // whole[index], splits=splits, counts=counts))
        return MixedSplits(parts)

    def local_paths(self) -> list[Path]:
        return [path for source in self.sources for path in source.local_paths()]

    def public_name(self) -> str:
        names = [source.public_name() for source in self.sources]
        return format_mixture(
            [replace(part, name=name) for part, name in zip(self.parts, names, strict=True)]
        )

    def folder_name(self) -> str:
        return folder_names.mixture_name(self.value, [source.public_name() for source in self.sources])

    @property
    def needs_network(self) -> bool:
        return any(source.needs_network for source in self.sources)

    def num_download_bytes(self, revision: str | None, splits: Collection[str]) -> int:
        revisions = self.split_revision(revision)
        return sum(
            source.num_download_bytes(part, splits)
            for source, part in zip(self.sources, revisions, strict=True)
        )

    @property
    def dataset_ids(self) -> list[str]:
        return list(dict.fromkeys(name for source in self.sources for name in source.dataset_ids))

    @property
    def label(self) -> str:
        parts = zip(self.parts, self.sources, strict=True)
        names = [
            f"`{source.public_name().replace('`', '')}` (weight {part.weight})" for part, source in parts
        ]
        return f"a mixture of {', '.join(names[:-1])} and {names[-1]}" if names[1:] else names[0]

    @property
    def license(self) -> str | None:
        licenses = [source.license for source in self.sources]
        return None if None in licenses else "; ".join(dict.fromkeys(filter(None, licenses)))
