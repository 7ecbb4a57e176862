"""What a run folder tells of the run so far: its metrics and the stories told on the way."""

import json
import re
from pathlib import Path
from typing import Any

from tinystories_slm.data import builtin
from tinystories_slm.data.origin import BUILTIN
from tinystories_slm.data.prepare import Manifest


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def read_samples(path: Path) -> list[tuple[int, str]]:
    """The stories of a samples.md with the steps they were told at, in the order of the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    samples = []
    # Every line of a story is quoted, so that none of them can look like a heading.
    for section in re.split(r"^## step (?=\d+$)", text, flags=re.MULTILINE)[1:]:
        step, _, quoted = section.partition("\n")
        lines = [line.removeprefix(">").removeprefix(" ") for line in quoted.strip().splitlines()]
        samples.append((int(step), "\n".join(lines)))
    return samples


def entropy_per_token(manifest: Manifest) -> float | None:
    """Of the built-in corpus, in nats per token of this vocabulary; None for any other source."""
    if manifest.source != BUILTIN:
        return None
    validation = manifest.splits["validation"]
    return builtin.entropy() * validation["num_stories"] / validation["num_tokens"]
