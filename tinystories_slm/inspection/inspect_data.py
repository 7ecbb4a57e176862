"""The `inspect_data` command: the windows that a step read, or the steps that read a story."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tinystories_slm.config.command_args.inspection import InspectDataArgs
from tinystories_slm.data.packing import IGNORED_LABEL
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.errors import UserError
from tinystories_slm.inspection.run_data import RunData, StoryPart
from tinystories_slm.io.atomic import write_output

_SHOWN_CHARACTERS = 60


def inspect_data(args: InspectDataArgs) -> dict[str, Any]:
    """Print what `args` select, and write it to `args.output` as JSON.

    Returns:
        The contents of the JSON file.

    Raises:
        UserError: the run has no such step or story, or its data are not available.
    """
    run = RunData.open(args.run)
    if args.step is not None:
        record = describe_step(run, args.step)
        lines = _format_step(record)
    else:
        stories = _find_stories(run, args)
        record = describe_stories(run, stories)
        lines = _format_stories(record)
    if args.output is not None:
        write_output(args.output, json.dumps(record, ensure_ascii=False) + "\n")
    print("\n".join(lines))
    return record


def describe_step(run: RunData, step: int) -> dict[str, Any]:
    """Return the windows of optimizer step `step`, from 1: token ids, text, and the parts of stories."""
    batch, all_parts = run.batch(step), run.parts(step)
    windows = []
    for row, parts in enumerate(all_parts):
        window: dict[str, Any] = {
            "row": row,
            "parts": [asdict(part) for part in parts],
            "text": run.tokenizer.decode(batch.input_ids[row]),
            "input_ids": batch.input_ids[row].tolist(),
        }
        if batch.labels is not batch.input_ids:
            window["labels"] = batch.labels[row].tolist()
        if batch.position_ids is not None:
            window["position_ids"] = batch.position_ids[row].tolist()
        windows.append(window)
    read = {part.story for parts in all_parts for part in parts if part.has_text}
    return {
        "step": step,
        "data_dir": str(run.config.data.data_dir),
        "packing": run.config.data.packing,
        "num_predicted": _num_predicted(batch.labels),
        "stories": sorted(read),
        "windows": windows,
    }


def describe_stories(run: RunData, stories: list[int]) -> dict[str, Any]:
    """Return the steps that read text of each of `stories`, rows of raw/train.parquet."""
    reads: dict[int, list[dict[str, Any]]] = {story: [] for story in stories}
    for step, row, part in run.reads_of(np.array(stories, dtype=np.int64)):
        reads[part.story].append({"step": step, "row": row, **asdict(part)})
    texts = _read_texts(run, stories)
    return {
        "num_steps": run.num_steps,
        "data_dir": str(run.config.data.data_dir),
        "stories": [
            {
                "story": story,
                "text": texts[story],
                "steps": list(dict.fromkeys(read["step"] for read in reads[story])),
                "reads": reads[story],
            }
            for story in stories
        ],
    }


def _num_predicted(labels: np.ndarray) -> int:
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


def _find_stories(run: RunData, args: InspectDataArgs) -> list[int]:
    """Return the rows of raw/train.parquet that `args` name.

    Raises:
        UserError: there is no such training story.
    """
    num_stories = len(run.dataset.document_ends)
    if args.story is not None:
        if args.story >= num_stories:
            raise UserError(
                f"story ({args.story}): must be below {num_stories}, the number of training stories"
            )
        return [args.story]
    found = [
        row
        for row, text in enumerate(iter_raw_stories(run.config.data.data_dir, "train"))
        if args.text in text
    ]
    if not found:
        raise UserError(f"text ({args.text}): must occur in a training story; correct it")
    return found


def _read_texts(run: RunData, stories: list[int]) -> dict[int, str]:
    wanted = set(stories)
    path: Path = run.config.data.data_dir / "raw" / "train.parquet"
    texts, first = {}, 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            rows = [row for row in wanted if first <= row < first + size]
            if rows:
                column = file.read_row_group(group, columns=["text"]).column(0)
                texts |= {row: column[row - first].as_py() for row in rows}
            first += size
    return texts


def _format_step(record: dict[str, Any]) -> Iterator[str]:
    yield (
        f"step {record['step']}: {len(record['windows'])} windows with text of {len(record['stories'])} "
        f"stories, {record['num_predicted']:,} tokens predicted; a story is named by its row in "
        f"{record['data_dir']}/raw/train.parquet"
    )
    for window in record["windows"]:
        yield ""
        parts = (StoryPart(**part) for part in window["parts"])
        yield f"window {window['row']}: " + ", ".join(_format_part(part) for part in parts if part.has_text)
        yield window["text"]


def _format_part(part: StoryPart) -> str:
    last = part.first_token + part.num_tokens - 1
    return f"story {part.story} (tokens {part.first_token}-{last} of {part.story_tokens})"


def _format_stories(record: dict[str, Any]) -> Iterator[str]:
    for story in record["stories"]:
        text = " ".join(story["text"].split())
        short = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
        yield f"story {story['story']}: {short}"
        steps = ", ".join(map(str, story["steps"])) or "no step"
        yield f"read by {steps if not story['steps'] else 'step ' + steps} of {record['num_steps']} steps"
