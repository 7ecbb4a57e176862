"""The `exposure` command: how far a run memorized its canaries (`data.canaries`), by step.

The exposure of a canary is log2 of the number of fillings of its template, minus log2 of the rank of its loss
among theirs (Carlini et al., "The Secret Sharer", USENIX Security 2019, arXiv 1802.08232). A canary that was
not memorized has 1.44 bits on average; one with the lowest loss of all has log2 of their number.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.canaries import Canary, parse_canaries
from tinystories_slm.config.command_args.inspection import ExposureArgs
from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.scored_boundaries import find_scored_boundaries
from tinystories_slm.evaluation.scoring import score_model
from tinystories_slm.io.atomic import write_output
from tinystories_slm.model_folder import load_model_folder, weights_sha256
from tinystories_slm.runs.run_dir import RunDir, read_json_object

logger = logging.getLogger(__name__)

_QUANTILE_95 = 1.96


def measure_exposure(args: ExposureArgs) -> dict[str, Any]:
    """Print the exposure of each canary of `args.run` at each kept step and in last/, and write it as JSON.

    Returns:
        The contents of the JSON file.

    Raises:
        UserError: the run has no canary with alternatives, or no model.
    """
    run_dir = RunDir(args.run)
    canaries = _read_canaries(run_dir)
    steps = []
    for step, folder in _models(run_dir).items():
        model, tokenizer = load_model_folder(str(folder), device=args.device)
        steps.append(
            {
                "step": step,
                "weights_sha256": weights_sha256(folder),
                "canaries": [_measure(model, tokenizer, canary, args) for canary in canaries],
            }
        )
        logger.info("step %d: %s", step, _format_exposures(steps[-1]))
    record = {
        "num_alternatives": args.num_alternatives,
        "seed": args.seed,
        "canaries": [
            {"template": one.template, "text": one.text, "count": one.count, "num_fillings": one.num_fillings}
            for one in canaries
        ],
        "steps": steps,
    }
    output = args.output or args.run / "exposure.json"
    write_output(output, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(_format_table(record))
    print(output)
    return record


def exposure_of(nats: float, alternatives: np.ndarray, num_fillings: int) -> dict[str, Any]:
    """Return the exposure in bits of a text with the loss `nats` (summed), and its 95 % interval.

    `alternatives` (n,) are the losses of all `num_fillings` - 1 other fillings, which makes the rank exact,
    or of fewer random ones. The share of alternatives with a lower loss then has a Wilson interval, from
    which that of the exposure follows; a canary below all n of them has an open end at log2 `num_fillings`.
    """
    num_others, num_lower = num_fillings - 1, int((alternatives < nats).sum())
    is_exact = len(alternatives) == num_others
    share = num_lower / len(alternatives)
    low, high = (share, share) if is_exact else wilson_interval(num_lower, len(alternatives))
    total = math.log2(num_fillings)
    return {
        "exposure": total - math.log2(1 + share * num_others),
        "low": total - math.log2(1 + high * num_others),
        "high": total - math.log2(1 + low * num_others),
        "nats": nats,
        "num_lower": num_lower,
        "num_compared": len(alternatives),
        "is_exact": is_exact,
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score method; valid for none and all, too."""
    share, z2 = successes / trials, _QUANTILE_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _QUANTILE_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return (0.0 if successes == 0 else center - half), (1.0 if successes == trials else center + half)


def _read_canaries(run_dir: RunDir) -> list[Canary]:
    config = run_dir.load_config()
    if config is None:
        raise UserError(f"run ({run_dir.path}): must be a run directory with a config.yaml; correct the path")
    found = [canary for canary in parse_canaries(config.data.canaries) if canary.num_fillings > 1]
    if not found:
        raise UserError(
            f"run ({run_dir.path}): has no canary with slots; train with "
            "--data.canaries \"[{text: 'The code is {digit}{digit}{digit}.', count: 10}]\""
        )
    return found


def _models(run_dir: RunDir) -> dict[int, Path]:
    """Return the model folders of the kept steps and of the last step, in order."""
    found = run_dir.kept_steps()
    last = read_json_object(run_dir.last / "config.json").get("training_step")
    if isinstance(last, int):
        found.setdefault(last, run_dir.last)
    if not found:
        raise UserError(f"run ({run_dir.path}): must have models in steps/ or last/; train it first")
    return dict(sorted(found.items()))


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, canary: Canary, args: ExposureArgs
) -> dict[str, Any]:
    texts = [canary.text, *map(canary.fill, _choose_alternatives(canary, args.num_alternatives, args.seed))]
    # Ours, or a fine-tuned model of ours: the boundaries do not depend on the texts.
    boundaries = find_scored_boundaries(
        model, tokenizer, encode_stories(tokenizer, texts[:1]), batch_size=args.batch_size
    )
    scores = score_model(model, tokenizer, texts, batch_size=args.batch_size, boundaries=boundaries).scores
    return exposure_of(float(scores.nats[0]), scores.nats[1:], canary.num_fillings)


def _choose_alternatives(canary: Canary, number: int, seed: int) -> Sequence[int]:
    """Return the other fillings, all or `number` different random ones of them, by their index."""
    num_others = canary.num_fillings - 1
    if num_others <= number:
        chosen = np.arange(num_others)
    else:
        rng = np.random.default_rng([seed, canary.index])
        chosen = np.zeros(0, dtype=np.int64)
        while len(chosen) < number:
            chosen = np.unique(np.concatenate([chosen, rng.integers(num_others, size=number)]))
        chosen = rng.permutation(chosen)[:number]
    return (chosen + (chosen >= canary.index)).tolist()


def _format_exposures(step: dict[str, Any]) -> str:
    return ", ".join(f"{one['exposure']:.1f}" for one in step["canaries"]) + " bits"


def _format_table(record: dict[str, Any]) -> str:
    """Return the canaries, and a row of exposures in bits with their intervals for each step."""
    lines = [
        f"canary {number}: {one['text']!r}, {one['count']} copies, {one['num_fillings']:,} fillings "
        f"({math.log2(one['num_fillings']):.1f} bits)"
        for number, one in enumerate(record["canaries"])
    ]
    lines.append(f"{'step':>8}" + "".join(f"{f'canary {n}':>20}" for n in range(len(record["canaries"]))))
    for step in record["steps"]:
        cells = [f"{one['exposure']:.2f} ({one['low']:.1f}-{one['high']:.1f})" for one in step["canaries"]]
        lines.append(f"{step['step']:>8}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
