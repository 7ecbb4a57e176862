"""Runs of a sweep: every combination of variants, grid and seeds as a configuration of `train`."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from tinystories_slm.config import RunConfig, flatten, parse_config, to_dict
from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.config.flags import format_value, to_flags
from tinystories_slm.errors import UserError

VARIANT = "variant"
"""Name of the axis of `variants`."""
_OF_SWEEP = ("output_dir", "train.seed")
"""Options that the sweep sets itself."""
_NOT_IN_DATA = {"data_dir", "seq_len", "packing", "mask_across_stories", "loss_on", "num_workers"}
"""Options of the section `data` that change no prepared file."""


@dataclass(frozen=True)
class Axis:
    """A dimension of the sweep: labels, and the options of each."""

    name: str
    options: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class SweepRun:
    """One run: an ordinary configuration, and its place in the sweep."""

    name: str
    """Name of the run directory."""
    labels: Mapping[str, str]
    """Label on each axis."""
    seed: int
    config: RunConfig
    flags: tuple[str, ...]
    """Command line of `train` that has `config`."""
    baseline: str | None = None
    """Name of the run that this one is compared with."""
    is_twin: bool = False
    """Whether this is a baseline that is trained beside another run (`concurrent_baseline`)."""


def expand_sweep(args: SweepArgs) -> list[SweepRun]:
    """Return the runs of the sweep: all combinations with the first seed, then all with the next one.

    Raises:
        UserError: lists every problem of the sweep file and of the configurations of its runs.
    """
    axes = read_axes(args)
    baseline = _baseline_labels(args, axes)
    points = [dict(zip([axis.name for axis in axes], labels, strict=True)) for labels in _combinations(axes)]
    chosen = [labels for labels in points if _is_chosen(args, labels, baseline)]
    builder = _RunBuilder(args, axes)
    runs = []
    for seed, labels in product(args.seeds, chosen):
        run = builder.build(labels, seed)
        others = labels | baseline
        if baseline and others != labels:
            name = f"{run.name}-baseline" if args.concurrent_baseline else builder.name(others, seed)
            run = replace(run, baseline=name)
            if args.concurrent_baseline:
                runs += [run, replace(builder.build(others, seed, name), is_twin=True)]
                continue
        elif args.concurrent_baseline:
            continue  # trained beside each run
        runs.append(run)
    builder.raise_problems()
    _check_names(runs)
    return runs


def read_axes(args: SweepArgs) -> list[Axis]:
    """Return the axes of the sweep file, variants first.

    Raises:
        UserError: lists every axis without values, with values of another form, or with options of another.
    """
    problems: list[str] = []
    axes = [_read_axis(VARIANT, args.variants, problems)] if args.variants else []
    axes += [_read_axis(str(name), values, problems) for name, values in args.grid.items()]
    owners: dict[str, str] = {}
    for axis in axes:
        for option in dict.fromkeys(name for options in axis.options.values() for name in options):
            if option in _OF_SWEEP:
                use = "seeds" if option == "train.seed" else "output_dir of the sweep"
                problems.append(f"{axis.name}: {option} is set for each run; use {use}")
            if option in owners:
                problems.append(f"{option} is set by {owners[option]} and by {axis.name}; remove one")
            owners[option] = axis.name
    names = [axis.name for axis in axes]
    if VARIANT in names[1:]:
        problems.append(f"grid ({VARIANT}): is the name of variants; rename it")
    if problems:
        raise UserError("; ".join(problems))
    return [replace(axis, name=_short_name(axis.name, names)) for axis in axes]


def _read_axis(name: str, values: Any, problems: list[str]) -> Axis:
    if isinstance(values, list) and values and not any(isinstance(value, list | dict) for value in values):
        return Axis(name, {format_value(value): {name: value} for value in values})
    if isinstance(values, Mapping) and values:
        options = {format_value(label): {} if named is None else named for label, named in values.items()}
        if all(isinstance(named, Mapping) for named in options.values()):
            return Axis(name, {label: flatten(named) for label, named in options.items()})
    form = "names with options" if name == VARIANT else "a list of values, or labels with options"
    problems.append(f"{name} ({json.dumps(values, default=str)[:60]}): must hold {form}; see docs/sweeps.md")
    return Axis(name, {})


def _short_name(name: str, names: Sequence[str]) -> str:
    """Return the last part of an option's name, if no other axis has the same."""
    short = name.rpartition(".")[2]
    return short if [other.rpartition(".")[2] for other in names].count(short) == 1 else name


def _combinations(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    return list(product(*(axis.options for axis in axes)))


def _baseline_labels(args: SweepArgs, axes: Sequence[Axis]) -> dict[str, str]:
    """Return the label of the baseline on each axis that `baseline` names.

    Raises:
        UserError: an axis or a label does not exist.
    """
    known = {axis.name: axis.options for axis in axes}
    labels = {str(name): format_value(label) for name, label in args.baseline.items()}
    for name, label in labels.items():
        if name not in known:
            raise UserError(f"baseline ({name}): must name an axis; use {' or '.join(known) or 'a grid'}")
        if label not in known[name]:
            raise UserError(f"baseline ({name}: {label}): must be one of {', '.join(known[name])}")
    return labels


def _is_chosen(args: SweepArgs, labels: Mapping[str, str], baseline: Mapping[str, str]) -> bool:
    """Whether `only` selects the labels; the baseline belongs to every selection."""
    if not args.only:
        return True
    is_baseline = bool(baseline) and labels | baseline == labels
    return is_baseline or bool(set(args.only) & set(labels.values()))


class _RunBuilder:
    """Builds the runs, and collects the problems of all of them."""

    def __init__(self, args: SweepArgs, axes: Sequence[Axis]) -> None:
        self._args, self._axes = args, {axis.name: axis for axis in axes}
        self._problems: dict[str, list[str]] = {}
        self._options = flatten(args.options)
        known = {label for axis in axes for label in axis.options}
        for name in set(args.only) - known:
            self._problems[f"only ({name}): must be a label; use {', '.join(sorted(known))}"] = []
        for name in set(self._options) & set(_OF_SWEEP):
            self._problems[f"options ({name}): is set for each run; use seeds or output_dir"] = []
        self._base_flags = [f"--config={path}" for path in args.bases]
        self._base = parse_config(self._base_flags)
        self._reference = self._base
        if "data.data_dir" in self._options:
            self._reference = self._parse("options", self._options) or self._base

    def name(self, labels: Mapping[str, str], seed: int) -> str:
        """Return the name of the run directory."""
        parts = [label if axis == VARIANT else f"{axis}_{label}" for axis, label in labels.items()]
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("_") for part in [*parts, f"seed_{seed}"])

    def build(self, labels: Mapping[str, str], seed: int, name: str | None = None) -> SweepRun:
        """Return the run; if its configuration is invalid, note the problem and return the base."""
        options = dict(self._options)
        for axis, label in labels.items():
            options |= self._axes[axis].options[label]
        name = name or self.name(labels, seed)
        own = {"train.seed": seed, "output_dir": self._args.output_dir / name}
        config = self._parse(name, options | own) or self._base
        if config.train.resume == "never":
            problem = "train.resume (never): a sweep resumes its runs; remove it"
            self._problems.setdefault(problem, []).append(name)
        data_dir = self._data_dir(config)
        config = replace(config, data=replace(config.data, data_dir=data_dir))
        flags = (*self._base_flags, *to_flags(_differences(self._base, config)))
        return SweepRun(name, dict(labels), seed, config, flags)

    def raise_problems(self) -> None:
        """Raise the problems of all runs together, each once."""
        if self._problems:
            raise UserError("; ".join(map(_format_problem, self._problems.items())))

    def _parse(self, name: str, options: Mapping[str, Any]) -> RunConfig | None:
        try:
            return parse_config([*self._base_flags, *to_flags(options)])
        except UserError as error:
            self._problems.setdefault(str(error).rstrip("."), []).append(name)
            return None

    def _data_dir(self, config: RunConfig) -> Path:
        """Return the folder of the prepared data: one for all runs with the same data and tokenizer."""
        reference = self._reference.data.data_dir
        if config.data.data_dir not in (reference, self._base.data.data_dir):
            return config.data.data_dir  # set by an axis
        identity = _data_identity(config)
        if identity == _data_identity(self._reference):
            return reference
        return reference.with_name(f"{reference.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")


def _data_identity(config: RunConfig) -> str:
    data = {name: value for name, value in asdict(config.data).items() if name not in _NOT_IN_DATA}
    return json.dumps([data, asdict(config.tokenizer)], default=str)


def _differences(base: RunConfig, config: RunConfig) -> dict[str, Any]:
    """Return the options of `config` that differ from `base`; the folder of the run comes last."""
    before, after = flatten(to_dict(base)), flatten(to_dict(config))
    changed = {name: value for name, value in after.items() if value != before[name]}
    return changed | {"output_dir": changed.pop("output_dir", after["output_dir"])}


def _format_problem(problem: tuple[str, Sequence[str]]) -> str:
    message, names = problem
    if not names:
        return message
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{message} ({', '.join(names[:2])}{more})"


def _check_names(runs: Sequence[SweepRun]) -> None:
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"grid ({min(twice)}): two runs would have this folder; use other labels")
    if not runs:
        raise UserError("grid ({}): the sweep has no run; set grid, variants or only")
