"""Plan the run of a command: measure this machine, choose the options, log and record the plan."""

import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tinystories_slm.config import RunConfig, flatten, replace_options, to_dict
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.doctor.numerics import precision_or_fallback
from tinystories_slm.doctor.resources import free_memory
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.device import training_device
from tinystories_slm.hardware.launch_env import num_launched_processes
from tinystories_slm.hardware.malloc import tune_malloc
from tinystories_slm.io.atomic import write_text
from tinystories_slm.io.units import format_duration
from tinystories_slm.planning.choice import (
    EVAL_STORIES,
    Budget,
    Measurement,
    Plan,
    Shape,
    choose_plan,
    is_larger_promising,
    num_evaluations,
    shapes,
    trial_options,
)
from tinystories_slm.planning.corpus import BUILTIN_BYTES_PER_STORY, StorySizes, read_sizes
from tinystories_slm.planning.law import BUILTIN, STORIES, LossLaw, load_law
from tinystories_slm.planning.probe import measure
from tinystories_slm.runs.run_dir import RunDir, read_json_object
from tinystories_slm.training.checkpoints import latest_valid_checkpoint, read_progress

logger = logging.getLogger(__name__)

# Seconds from the start of `train()` to the first step, and of the last save, beside preparation.
_START_S = 6.0
# 17 MB of TinyStories take less than two seconds of two cores longer than 2 MB.
_PREPARED_BYTES_PER_S = 1e7
_TOKENIZER_STORIES = 8000
_MEMORY_SHARE = 0.8
# Measurement, at most, as a share of the time.
_MAX_PROBE_SHARE = 0.1


def plan_config(
    config: RunConfig,
    given: Collection[str],
    minutes: float,
    *,
    num_scored_after: int = 0,
    law_file: Path | None = None,
) -> RunConfig:
    """Return `config` with every option that is not in `given` chosen for `minutes` on this machine.

    A run that was planned before keeps its options, and the log has a new plan for the rest of its time.

    Args:
        config: Options of the command line, and defaults.
        given: Names of the options that the command line sets.
        minutes: Time from the start of this process to the end of the command.
        num_scored_after: Stories that the command scores after training.
        law_file: File of laws; None for that of this package.

    Raises:
        UserError: the time or the memory is too small, an option contradicts it, a launcher is used, or the
            file has no law for the data.
    """
    if num_launched_processes() > 1:
        raise UserError(f"minutes ({minutes:g}): must be planned on one process; start it without a launcher")
    if "train.max_minutes" in given:
        raise UserError(
            f"train.max_minutes ({config.train.max_minutes}): cannot be combined with minutes ({minutes:g}); "
            "remove one"
        )
    fixed = _options(config, given)
    run_dir = RunDir(config.output_dir)
    found = run_dir.load_config()
    if found is not None and run_dir.plan.is_file() and config.train.resume != "never":
        found = replace_options(found, _options(config, {*given, "output_dir"}))
        _log_rest(run_dir, found, law_file)
        return found
    tune_malloc()  # as a run does, whose steps are measured
    name = BUILTIN if find_source(config.data.source, config.data.subset).is_builtin_corpus else STORIES
    law = load_law(name, law_file)
    config = _with_vocabulary(config, law, given)
    plan, sizes = _choose(config, law, fixed, minutes, num_scored_after)
    options = dict(plan.options)
    if "data.max_stories" not in given:
        options["data.max_stories"] = sizes.num_stories(plan.chosen.num_tokens * law.bytes_per_token)
    planned = replace_options(config, options)
    for line in describe_plan(plan, planned, law, minutes):
        logger.info("%s", line)
    run_dir.path.mkdir(parents=True, exist_ok=True)
    write_text(run_dir.plan, json.dumps(_record(plan, name, minutes, options), indent=2) + "\n")
    return planned


def _choose(
    config: RunConfig, law: LossLaw, fixed: Mapping[str, Any], minutes: float, num_scored_after: int
) -> tuple[Plan, StorySizes]:
    """Measure shapes from small to large until larger ones are worse, and return the plan."""
    started_s, age_s = time.perf_counter(), _process_age_s()
    tokens_per_story = BUILTIN_BYTES_PER_STORY / law.bytes_per_token
    memory_limit = _MEMORY_SHARE * free_memory(training_device())
    measured: dict[Shape, Measurement] = {}
    sizes: StorySizes | None = None
    for shape in shapes(fixed):
        trial = replace_options(config, trial_options(shape) | dict(fixed))
        measured[shape] = measure(trial)
        if sizes is None:  # the smallest shape reads most
            num_bytes = 60 * minutes * measured[shape].tokens_per_second * law.bytes_per_token
            sizes = read_sizes(config.data, num_bytes)
        seconds = 60 * minutes - age_s - (time.perf_counter() - started_s)
        budget = Budget(
            seconds=seconds,
            fixed_s=_START_S,
            per_token_s=law.bytes_per_token / _PREPARED_BYTES_PER_S,
            evaluated_tokens=num_evaluations(seconds) * EVAL_STORIES * tokens_per_story,
            evaluated_after=num_scored_after * tokens_per_story,
            is_bf16=precision_or_fallback(config, training_device()) == "bf16",
        )
        plan = choose_plan(
            law,
            measured,
            budget,
            unique_tokens=sizes.num_bytes / law.bytes_per_token,
            memory_limit=memory_limit,
            fixed=fixed,
        )
        is_over = time.perf_counter() - started_s > _MAX_PROBE_SHARE * 60 * minutes
        if is_over or not is_larger_promising(plan, shape):
            break
    return plan, sizes


def describe_plan(plan: Plan, config: RunConfig, law: LossLaw, minutes: float) -> list[str]:
    """Return the plan as lines: what was chosen, what is expected, and why."""
    chosen, train = plan.chosen, config.train
    layers, width = chosen.shape
    expected, error = chosen.bits_per_byte, chosen.bits_per_byte * plan.relative_error
    lines = [
        f"plan for {minutes:g} min: {layers} layers x {width}, vocabulary {config.tokenizer.vocab_size:,}, "
        f"about {plan.num_steps:,} steps of {train.batch_size} x {config.data.seq_len} tokens at "
        f"{chosen.tokens_per_second:,.0f} tokens/s",
        f"expected: {expected:.3f} bits per byte of held-out text (standard deviation of a run {error:.3f})",
    ]
    lines += [
        f"  {one.shape[0]} x {one.shape[1]}: {one.tokens_per_second:,.0f} tokens/s, "
        f"{one.num_tokens / 1e6:.2f} M tokens, {one.bits_per_byte:.3f}"
        + ("" if one.shape != chosen.shape else " (chosen)")
        for one in sorted(plan.others, key=lambda one: one.num_parameters)
    ]
    if plan.extrapolation:
        lines.append(f"the law was fitted on other runs: this one has {plan.extrapolation}")
    return lines


def _log_rest(run_dir: RunDir, config: RunConfig, law_file: Path | None) -> None:
    """Log a new plan for the rest of a stopped run: steps and decay follow the clock of this machine."""
    newest = latest_valid_checkpoint(run_dir.path)
    progress = read_progress(newest) if newest else None
    if progress is None or progress.finished or config.train.max_minutes is None:
        return
    tune_malloc()
    planned = read_json_object(run_dir.plan)
    law, now = load_law(planned["law"], law_file), measure(config)
    left_s = max(0.0, 60 * config.train.max_minutes - progress.seconds)
    tokens_per_step = config.train.batch_size * config.data.seq_len
    num_steps = progress.step + int(left_s * now.tokens_per_second / tokens_per_step)
    loss = law.bits_per_byte(now.num_parameters, num_steps * tokens_per_step)
    logger.info(
        "planned again from step %d: %s left at %s tokens/s (the plan had %s) allow about %d steps, not "
        "%d; the learning rate decays by the clock; expected %.3f bits per byte, not %.3f",
        progress.step, format_duration(left_s), f"{now.tokens_per_second:,.0f}",
        f"{planned['tokens_per_second']:,.0f}", num_steps, planned["num_steps"],
        loss, planned["bits_per_byte"],
    )  # fmt: skip


def _with_vocabulary(config: RunConfig, law: LossLaw, given: Collection[str]) -> RunConfig:
    """Return `config` with the vocabulary of the law's runs, unless one is given."""
    if {"tokenizer.vocab_size", "tokenizer.pretrained"} & set(given):
        return config
    options = {"tokenizer.vocab_size": law.vocab_size}
    if "tokenizer.max_stories" not in given:
        options["tokenizer.max_stories"] = _TOKENIZER_STORIES
    return replace_options(config, options)


def _options(config: RunConfig, names: Collection[str]) -> dict[str, Any]:
    """Return the values of the options of a run among `names`."""
    found = {}
    for name in set(flatten(to_dict(config))) & set(names):
        section, _, option = name.rpartition(".")
        found[name] = getattr(getattr(config, section) if section else config, option)
    return found


def _record(plan: Plan, name: str, minutes: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan as JSON types."""
    return {
        "minutes": minutes,
        "law": name,
        "bits_per_byte": plan.chosen.bits_per_byte,
        "relative_error": plan.relative_error,
        "extrapolation": plan.extrapolation,
        "num_steps": plan.num_steps,
        "tokens_per_second": plan.chosen.tokens_per_second,
        "candidates": [asdict(one) for one in plan.others],
        "options": dict(options),
    }


def _process_age_s() -> float:
    return time.time() - psutil.Process().create_time()
