"""The `surprisal` command: loss, rank and entropy of each token of stories, as parquet."""

import json
import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.inspection import SurprisalArgs
from tinystories_slm.data.batches import iter_batches
from tinystories_slm.data.source_stories import resolve_revision
from tinystories_slm.data.tokenizer import encode_stories, token_character_ends
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.scored_boundaries import ScoredBoundaries, find_scored_boundaries
from tinystories_slm.evaluation.scoring import score_model
from tinystories_slm.evaluation.selection import StorySelection, select_stories
from tinystories_slm.evaluation.training_data import read_training_data
from tinystories_slm.inspection.surprisal_page import render_story
from tinystories_slm.io.atomic import atomic_write, remove_directory, write_output
from tinystories_slm.io.file_errors import expand_user, translate_write_errors
from tinystories_slm.model_folder import load_model_folder, resolve_model, weights_sha256

logger = logging.getLogger(__name__)

_FACTS = b"surprisal"
"""Key of the facts in the metadata of the file."""
# Stories of a part: what a killed command computes again.
_PART_STORIES = 64
SCHEMA = pa.schema(
    {
        "story": pa.int32(),  # among the scored stories, from 0
        "token": pa.int32(),  # in the story, from 0
        "token_id": pa.int32(),
        "start": pa.int32(),  # characters of the story before the token
        "end": pa.int32(),  # characters before its end; equal to start for the end token
        "nats": pa.float32(),
        "rank": pa.int32(),  # 1 for the most probable id; null for a uniform guess
        "entropy": pa.float32(),  # of the prediction, in nats
    }
)


def surprisal(args: SurprisalArgs) -> Path:
    """Score each token of `args.data` under `args.model`, and write `args.output`; draw a story on request.

    A command that was interrupted continues after the last complete part. A complete file with the same
    facts (model, weights, data, options) is kept.

    Raises:
        UserError: the model or the data cannot be read or scored, or the output cannot be written.
    """
    model, tokenizer = load_model_folder(
        args.model,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        requires_eos=False,
    )
    selection, facts = _select(args, model)
    if args.plot_story is not None and args.plot_story >= len(selection.texts):
        raise UserError(
            f"plot_story ({args.plot_story}): must be below {len(selection.texts)}, the number of stories"
        )
    if _read_facts(args.output) != facts:
        with translate_write_errors("output", args.output):
            _write_parts(args, model, tokenizer, selection.texts, facts)
            _merge(args.output, facts)
    else:
        logger.info("%s is complete", args.output)
    _print_summary(args.output)
    if args.plot_story is not None:
        page = args.output.with_suffix(f".story{args.plot_story}.html")
        tokens = pq.read_table(args.output, filters=[("story", "=", args.plot_story)]).to_pylist()
        text = selection.texts[args.plot_story]
        write_output(page, render_story(args.model, args.plot_story, text, tokens))
        print(page)
    return args.output


def _select(args: SurprisalArgs, model: PreTrainedModel) -> tuple[StorySelection, dict[str, Any]]:
    """Return the stories that `evaluate` scores with these options, and all that determines the file."""
    names = ("data", "subset", "split", "max_stories", "text_column", "revision", "model_revision")
    options = {name: getattr(args, name) for name in names}
    revision = resolve_revision(args.data, args.revision, args.subset)
    folder = resolve_model(args.model, args.model_revision).name
    trained_on = read_training_data(folder, model.config)
    selection = select_stories(EvaluateArgs(model=args.model, **options), revision, trained_on)
    facts = {
        **options,
        "revision": revision,
        "model": args.model,
        "commit": getattr(model.config, "_commit_hash", None),
        "weights_sha256": weights_sha256(expand_user(folder)),
        "num_stories": len(selection.texts),
        **{name: getattr(args, name) for name in ("dtype", "batch_size", "end_token")},
        "version": version("tinystories_slm"),
    }
    return selection, facts


def _write_parts(
    args: SurprisalArgs,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    facts: dict[str, Any],
) -> None:
    """Write the parts that are missing, each a parquet file of `_PART_STORIES` stories."""
    folder = _parts_folder(args.output)
    record = folder / "facts.json"
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != facts:
        remove_directory(folder)
        folder.mkdir()
        with atomic_write(record) as partial:
            partial.write_text(json.dumps(facts), encoding="utf-8")
    boundaries = find_scored_boundaries(
        model,
        tokenizer,
        encode_stories(tokenizer, texts[:_PART_STORIES]),
        end_token=args.end_token,
        batch_size=args.batch_size,
    )
    first = 0
    with tqdm(total=len(texts), desc="surprisal", unit="story", disable=None) as bar:
        for number, stories in enumerate(iter_batches(texts, _PART_STORIES)):
            path = folder / f"{number:06d}.parquet"
            if not path.is_file():
                table = score_tokens(
                    model, tokenizer, stories, boundaries, args.batch_size, first_story=first
                )
                with atomic_write(path) as partial:
                    pq.write_table(table, partial)
            first += len(stories)
            bar.update(len(stories))


def score_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    boundaries: ScoredBoundaries,
    batch_size: int,
    *,
    first_story: int = 0,
) -> pa.Table:
    """Return a row of `SCHEMA` for each scored token of `texts`, whose first one is story `first_story`."""
    scores = score_model(
        model, tokenizer, texts, batch_size=batch_size, boundaries=boundaries, with_predictions=True
    ).scores
    end_ids = [] if boundaries.end_id is None else [boundaries.end_id]
    ids = [np.array([*story, *end_ids], dtype=np.int32) for story in encode_stories(tokenizer, texts)]
    ends = [
        np.maximum.accumulate(np.array([*story, *[len(text)] * len(end_ids)], dtype=np.int32))
        for text, story in zip(texts, token_character_ends(tokenizer, texts), strict=True)
    ]
    starts = [np.concatenate([[0], story[:-1]])[: len(story)] for story in ends]
    ranks = scores.token_ranks
    columns = {
        "story": scores.token_story + first_story,
        "token": np.concatenate([np.arange(len(story)) for story in ids]),
        "token_id": np.concatenate(ids),
        "start": np.concatenate(starts),
        "end": np.concatenate(ends),
        "nats": scores.token_nats,
        "rank": pa.array(ranks, mask=ranks == 0),
        "entropy": scores.token_entropies,
    }
    return pa.table({name: pa.array(columns[name]).cast(SCHEMA.field(name).type) for name in SCHEMA.names})


def _merge(output: Path, facts: dict[str, Any]) -> None:
    """Write the parts as row groups of `output`, and remove them."""
    folder = _parts_folder(output)
    schema = SCHEMA.with_metadata({_FACTS: json.dumps(facts).encode()})
    with atomic_write(output) as partial, pq.ParquetWriter(partial, schema) as writer:
        for part in _parts(folder):
            writer.write_table(part.replace_schema_metadata(schema.metadata))
    remove_directory(folder)


def _parts(folder: Path) -> Iterator[pa.Table]:
    return (pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def _parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _read_facts(output: Path) -> dict[str, Any] | None:
    """Return the facts of a complete file; None if there is none of this command."""
    try:
        return json.loads((pq.read_schema(output).metadata or {})[_FACTS])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def _print_summary(output: Path) -> None:
    table = pq.read_table(output, columns=["story", "nats", "rank"])
    nats = table["nats"].to_numpy().astype(np.float64)
    ranks = table["rank"].to_numpy()
    print(
        f"{output}: {len(nats):,} tokens of {len(table['story'].unique()):,} stories, "
        f"{nats.mean():.4f} nats per token, {np.mean(ranks == 1):.1%} of the tokens most probable"
    )
