"""Stories of a report card: generated from published prompts, held out, and those of training."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.data.source_stories import in_validation, needs_holdout, open_stories, resolve_revision
from tinystories_slm.data.sources.mixture import MixtureSource
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.selection import StorySelection, select_stories
from tinystories_slm.evaluation.training_data import TrainingData
from tinystories_slm.generation import generate_batch, prepare_requests
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.report_card.card_prompts import read_card_prompts
from tinystories_slm.report_card.measures import CardStory
from tinystories_slm.runs.run_dir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out stories, and where they and the training stories come from."""

    selection: StorySelection
    source: str
    subset: str | None
    text_column: str
    revision: str
    trained_on: TrainingData | None
    """Record of the model's last run on this source; None if nothing states it."""

    @property
    def is_builtin_corpus(self) -> bool:
        return find_source(self.source).is_builtin_corpus

    @property
    def public_name(self) -> str:
        """Name of the source without a path of this machine."""
        return find_source(self.source, self.subset).public_name()

    @property
    def stories(self) -> list[CardStory]:
        return [CardStory(text) for text in self.selection.texts]


def generate_stories(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, args: ReportCardArgs
) -> list[CardStory]:
    """Generate `args.num_stories` stories: story i from prompt i (mod their number) with the seed + i.

    Each has its own seed: with one seed, the texts of different prompts resemble each other.

    Raises:
        UserError: weights are not finite, or a prompt fills the model's context.
    """
    check_weights(model, name)
    prompts = read_card_prompts()
    sampling = args.sampling()
    requests = prepare_requests(
        model,
        tokenizer,
        [prompts[number % len(prompts)] for number in range(args.num_stories)],
        range(args.seed, args.seed + args.num_stories),
        sampling,
    )
    results = generate_batch(model, tokenizer, requests, sampling, batch_size=args.batch_size)
    return [
        CardStory(result.text, result.finish_reason == "stop", result.prompt, result.seed)
        for result in results
    ]


def check_weights(model: PreTrainedModel, name: str) -> None:
    """Check that every weight is a number.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    found = next((key for key, value in model.named_parameters() if not torch.isfinite(value).all()), None)
    if found is not None:
        raise UserError(f"model ({name}): weights must be finite, and {found} is not; use another checkpoint")


def select_held_out(args: ReportCardArgs, trained_on: Sequence[TrainingData] | None) -> HeldOut:
    """Return the first held-out stories of `args.data`, by default of what the model was trained on.

    Raises:
        UserError: the source is not known, is a mixture, or cannot be read.
    """
    source, subset, text_column = _find_data(args, trained_on)
    if isinstance(find_source(source), MixtureSource):
        raise UserError(f"data ({source}): a mixture has no card; set --data to one of its parts")
    revision = resolve_revision(source, args.revision, subset)
    selection = select_stories(
        EvaluateArgs(
            model=args.model, data=source, subset=subset, text_column=text_column, revision=args.revision,
            split=args.split, max_stories=args.num_stories,
        ),
        revision,
        trained_on,
    )  # fmt: skip
    records = [data for data in trained_on or () if data.is_from(source, revision, subset)]
    return HeldOut(
        selection=selection,
        source=source,
        subset=subset,
        text_column=text_column,
        revision=revision,
        trained_on=records[-1] if records else None,
    )


def _find_data(
    args: ReportCardArgs, trained_on: Sequence[TrainingData] | None
) -> tuple[str, str | None, str]:
    """Return source, subset and text column of the held-out stories.

    Raises:
        UserError: `args.data` is not set and the source of the model's run is unknown, or was a file here.
    """
    if args.data is not None:
        return args.data, args.subset, args.text_column
    folder = expand_user(args.model)
    if folder.is_dir() and (config := RunDir(folder.resolve().parent).load_config()):
        return config.data.source, config.data.subset, config.data.text_column
    if not trained_on:
        raise UserError(
            f"data is missing: nothing states what {args.model} was trained on; set --data to stories, "
            "such as builtin"
        )
    last = trained_on[-1]
    if last.revision.startswith("sha256:") and not Path(last.source).exists():
        raise UserError(
            f"data is missing: the model was trained on {last.source}, which was a local file; set --data"
        )
    return last.source, last.subset, args.text_column


def iter_training_stories(held_out: HeldOut) -> Iterator[str]:
    """Yield the stories that the model was trained on, or the whole training split if no record states it."""
    record = held_out.trained_on
    has_revisions = find_source(held_out.source).has_revisions
    splits = open_stories(
        held_out.source,
        text_column=held_out.text_column,
        revision=held_out.revision if has_revisions else None,
        subset=held_out.subset,
        cleaning=record.cleaning if record else (),
    )
    fraction = held_out.selection.validation_fraction
    if record is not None:
        fraction = record.validation_fraction if needs_holdout(splits, record.validation_split) else None
    stories = splits["train"]() if "train" in splits else iter(())
    for text in islice(stories, record.max_stories if record else None):
        if fraction is None or not in_validation(text, fraction):
            yield text
