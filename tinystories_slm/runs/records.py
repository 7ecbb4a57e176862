"""Read the records of a run: metrics.jsonl, samples.md, and the entropy of the built-in corpus."""

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinystories_slm import grammar
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.data.token_files import Manifest


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the numbers in each line of a metrics.jsonl; an incomplete last line, of a kill, is skipped."""
    lines = [_numbers_of(line) for line in read_json_lines(path)]
    return [line for line in lines if isinstance(line.get("step"), int)]


def _numbers_of(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if is_number(value)}


def is_number(value: object) -> bool:
    """Whether `value` of a JSON file is a number that fits a float; it may be infinite or undefined."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file up to the first damaged line; empty without the file."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    # Not `splitlines`: it also splits at U+2028 and U+0085, which a JSON string may hold.
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            json.dumps(line, ensure_ascii=False).encode("utf-8")  # no file can hold an unpaired surrogate
        except (ValueError, RecursionError):
            break
        if isinstance(line, dict):
            lines.append(line)
    return lines


def validation_metrics(lines: list[dict[str, Any]], step: int | None) -> dict[str, Any] | None:
    """Return the line of metrics.jsonl with the validation loss of step `step`.

    Args:
        lines: Lines of metrics.jsonl.
        step: Optimizer step of the model in best/; None if it is unknown, for the line with the lowest loss.
    """
    evaluated = [line for line in lines if math.isfinite(line.get("val/loss", math.nan)) and "step" in line]
    if step is not None:
        return next((line for line in reversed(evaluated) if line["step"] == step), None)
    return min(evaluated, key=lambda line: line["val/loss"], default=None)


def describe_extension(record: Mapping[str, Any]) -> str:
    """Return one phrase about a line of extensions.jsonl."""
    step, end, share = record["from_step"], record.get("end_step"), record.get("rewarm_lr_rate")
    if share is None:
        return f"extended from step {step:,}, before the decay of a run that ended at step {end:,}"
    return f"extended after its end at step {step:,}, warmed up again to {share:g} of the peak"


def dropped_metrics(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that an extension dropped: those of a decay that is trained again."""
    lines = record.get("metrics")
    found = [_numbers_of(line) for line in lines if isinstance(line, dict)] if isinstance(lines, list) else []
    return [line for line in found if isinstance(line.get("step"), int)]


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Return (optimizer step, story) for each story of a samples.md, in file order."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    samples = []
    # Each line of a story is quoted with `>`, so no line can look like a heading.
    for section in re.split(r"^## step (?=\d+$)", text, flags=re.MULTILINE)[1:]:
        step, _, quoted = section.partition("\n")
        lines = [line.removeprefix(">").removeprefix(" ") for line in quoted.strip("\n").split("\n")]
        samples.append((int(step), "\n".join(lines)))
    return samples


def entropy_per_token(manifest: Manifest) -> float | None:
    """Return the entropy of the built-in corpus in nats per token of this vocabulary.

    None for every other source: its entropy is unknown.
    """
    if not find_source(manifest.provenance.source).is_builtin_corpus:
        return None
    validation = manifest.splits["validation"]
    return grammar.entropy() * validation["num_stories"] / validation["num_tokens"]
