"""Choose the stories that `evaluate` scores, and count those that the model was trained on."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.data.source_stories import in_validation, needs_holdout, open_stories
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.training_data import TrainingData, num_records_of_last_run

logger = logging.getLogger(__name__)

WHOLE = "all"
"""Value of `split` in the scores of a source with one split that is scored whole."""
_DEFAULT_FRACTION = 0.05

StoryPredicate = Callable[[int, str], bool]
"""Function of the index of a story in the split it is read from, and its text."""


@dataclass(frozen=True, kw_only=True)
class StorySelection:
    """Stories to score, and where they come from."""

    texts: list[str]
    split: str
    """Split of the source, `validation` for held-out stories, or `WHOLE`."""
    validation_fraction: float | None
    """Share of the training split that was held out; None if the stories are a split of the source."""
    num_split_stories: int
    """Stories in the split, of which `texts` are the first."""
    num_source_stories: int
    """Stories that were read; more than `num_split_stories` if the split was held out of them."""
    num_training_by_model: Sequence[int | None]
    """Number of `texts` that each model was trained on; None if its training data are unknown."""
    cleaning: Sequence[str] = ()
    """Names of the cleaning rules that were applied to the stories, as in the model's last run."""
    reason: str = ""
    """Which stories these are, and why."""

    @property
    def num_training_stories(self) -> int | None:
        """Number of `texts` that the first model was trained on; None if its training data are unknown."""
        return self.num_training_by_model[0]

    def record(self, model: int = 0) -> dict[str, Any]:
        """Return the fields that the scores of the model of this index contain."""
        return {
            "split": self.split,
            "selection": self.reason,
            "validation_fraction": self.validation_fraction,
            "num_split_stories": self.num_split_stories,
            "num_source_stories": self.num_source_stories,
            "num_training_stories": self.num_training_by_model[model],
            "cleaning": list(self.cleaning),
        }


def select_stories(
    args: EvaluateArgs, revision: str, trained_on: Sequence[TrainingData] | None
) -> StorySelection:
    """Return the stories of `args.data` at `revision` to score with a model that was trained on `trained_on`.

    `args.split` names a split of the source. A missing `validation` is
    - every story, if the source has one split and the model was not trained on it;
    - the stories that were held out of training, if the model was trained on this source;
    - otherwise a hold-out by `args.validation_split` and `args.validation_fraction`.

    Stories of the source that the model was trained on are cleaned as for its last run.

    Raises:
        UserError: the source cannot be read, lacks the split, or has no such stories.
    """
    return select_common_stories(args, revision, [trained_on])


def select_common_stories(
    args: EvaluateArgs, revision: str, models: Sequence[Sequence[TrainingData] | None]
) -> StorySelection:
    """Return the stories to score with every one of `models`, each given by its training data.

    As `select_stories`, with the stories left out that any of the models was trained on.

    Raises:
        UserError: the source cannot be read, lacks the split, or has no such stories.
    """
    has_revisions = find_source(args.data).has_revisions
    by_model = [
        [data for data in trained_on or () if data.is_from(args.data, revision, args.subset)]
        for trained_on in models
    ]
    same_source = _order_records(by_model)
    cleaning = same_source[-1].cleaning if same_source else ()
    if len({tuple(data[-1].cleaning) for data in by_model if data}) > 1:
        logger.warning(
            "the runs of the models cleaned %s differently, and a hash of the cleaned text decides which "
            "stories are held out: a model may have been trained on another form of some scored stories",
            args.data,
        )
    splits = open_stories(
        args.data,
        text_column=args.text_column,
        revision=revision if has_revisions else None,
        subset=args.subset,
        cleaning=cleaning,
    )
    is_default = args.validation_split is None and args.validation_fraction is None
    source_split, split, fraction = _find_split(args, splits, same_source, is_default=is_default)
    if fraction is not None and same_source and all(data.revision != revision for data in same_source):
        logger.warning(
            "%s has the name of the model's training data and other contents: scoring only the stories that "
            "a hash of their text holds out; if all are new to the model, rename it, or use --split train",
            args.data,
        )
    was_trained_on = [partial(_is_in_training, data, splits, source_split, revision) for data in by_model]
    # A model that started from another one may have been trained on stories that only its last run held out.
    excluded = was_trained_on if is_default and fraction is not None else []
    held_out = partial(_is_held_out, fraction, excluded)
    texts, counts, num_split, num_source = _read(
        splits[source_split](), held_out, was_trained_on, args.max_stories
    )
    if not texts:
        raise _empty_error(args, split, fraction)
    is_known = all(trained_on is not None for trained_on in models)
    return StorySelection(
        texts=texts,
        split=split,
        validation_fraction=fraction,
        num_split_stories=num_split,
        num_source_stories=num_source,
        num_training_by_model=[
            None if trained_on is None else count for trained_on, count in zip(models, counts, strict=True)
        ],
        cleaning=cleaning,
        reason=_reason(args, split, fraction, was_trained=bool(same_source), is_known=is_known),
    )


def _read(
    stories: Iterable[str],
    is_selected: StoryPredicate,
    was_trained_on: Sequence[StoryPredicate],
    max_stories: int | None,
) -> tuple[list[str], list[int], int, int]:
    """Return the selected texts, training stories in them by model, all selected stories, all stories."""
    texts: list[str] = []
    counts = [0] * len(was_trained_on)
    num_selected = num_stories = 0
    for index, text in enumerate(stories):
        num_stories += 1
        if not is_selected(index, text):
            continue
        num_selected += 1
        if max_stories is None or len(texts) < max_stories:
            texts.append(text)
            counts = [
                n + is_trained(index, text) for n, is_trained in zip(counts, was_trained_on, strict=True)
            ]
    return texts, counts, num_selected, num_stories


def _is_held_out(fraction: float | None, excluded: Iterable[StoryPredicate], index: int, text: str) -> bool:
    return (fraction is None or in_validation(text, fraction)) and not any(
        is_trained(index, text) for is_trained in excluded
    )


def _order_records(by_model: Sequence[Sequence[TrainingData]]) -> list[TrainingData]:
    """Return all records, with the one last that states the split: of a model that held nothing out, if any.

    Such a model was trained on the whole training split, and the others were not trained on the source's
    validation split, either.
    """
    trained = [list(data) for data in by_model if data]
    trained.sort(key=lambda data: data[-1].validation_split == "auto")
    return [data for model in trained for data in model]


def _reason(
    args: EvaluateArgs, split: str, fraction: float | None, *, was_trained: bool, is_known: bool
) -> str:
    """Return which stories were scored, and why, as a phrase."""
    if fraction is None and split == WHOLE:
        unknown = "no record says that a model was trained on these data"
        untrained = "no model was trained on these data" if is_known else unknown
        reason = f"every story: {'the data have one split' if was_trained else untrained}"
    elif fraction is None:
        reason = f"the {split} split of the data"
    elif args.validation_split is not None or args.validation_fraction is not None:
        reason = f"stories that a hash of their text holds out, as the options demand (share {fraction:g})"
    elif was_trained:
        reason = f"stories that training held out by a hash of their text (share {fraction:g})"
    else:
        reason = (
            f"stories that every run on these data holds out by a hash of their text (share {fraction:g})"
        )
    return reason if args.max_stories is None else f"{reason}; the first {args.max_stories:,} of them"


def _find_split(
    args: EvaluateArgs, splits: Collection[str], same_source: Sequence[TrainingData], *, is_default: bool
) -> tuple[str, str, float | None]:
    """Return the split to read, its name in the scores, and the fraction to hold out of it; None for all.

    Raises:
        UserError: the source lacks the split.
    """
    rule = args.validation_split or (same_source[-1].validation_split if same_source else "auto")
    holds_out = args.split == "validation" and needs_holdout(splits, rule)
    if args.split in splits and not holds_out:
        return args.split, args.split, None
    is_builtin_corpus = find_source(args.data).is_builtin_corpus
    is_other_source = is_default and not same_source and not is_builtin_corpus
    if args.split == "validation" and len(splits) == 1 and (is_other_source or not holds_out):
        return next(iter(splits)), WHOLE, None
    if holds_out:
        default = same_source[-1].validation_fraction if same_source else _DEFAULT_FRACTION
        return "train", "validation", args.validation_fraction or default
    available = ", ".join(map(repr, sorted(splits)))
    raise UserError(
        f"data.source ({args.data}) has no split {args.split!r}, only {available}; "
        "set --split to one of these"
    )


def _is_in_training(
    same_source: Iterable[TrainingData],
    splits: Collection[str],
    source_split: str,
    revision: str,
    index: int,
    text: str,
) -> bool:
    """Whether story `index` of `source_split` was a training story of one of the runs `same_source`."""
    return source_split == "train" and any(
        not (needs_holdout(splits, data.validation_split) and in_validation(text, data.validation_fraction))
        # Of an edited source it is unknown which stories were the first ones.
        and not (data.max_stories is not None and revision == data.revision and index >= data.max_stories)
        for data in same_source
    )


def count_training_stories(texts: Sequence[str], trained_on: Sequence[TrainingData]) -> int:
    """Return how many validation stories of the last run in `trained_on` an earlier run was trained on.

    The earlier runs are those of the model that training started from.
    """
    num_last = num_records_of_last_run(trained_on)
    earlier, last_run = trained_on[:-num_last], trained_on[-num_last:]
    same_source = [
        data
        for data in earlier
        if any(data.is_from(last.source, last.revision, last.subset) for last in last_run)
    ]
    last = last_run[0]
    if not all(in_validation(text, last.validation_fraction) for text in texts):
        return 0  # the source has a validation split, which no run was trained on
    return sum(_is_in_training(same_source, ["train"], "train", last.revision, 0, text) for text in texts)


def _empty_error(args: EvaluateArgs, split: str, fraction: float | None) -> UserError:
    held_out = "" if fraction is None else f" (validation_fraction is {fraction})"
    fix = "use more stories" if fraction is None else "use more stories, or set another --validation_fraction"
    stories = "stories" if split == WHOLE else f"{split} stories"
    return UserError(f"data.source ({args.data}) has no {stories}{held_out}; {fix}")
