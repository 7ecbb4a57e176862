"""The sweep command: do what is missing of every run, and write table, plots and power law."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tinystories_slm.config import parse
from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.data.prepare import token_file_differences
from tinystories_slm.doctor.dry_run import estimate_duration
from tinystories_slm.doctor.numerics import precision_or_fallback
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.hardware.device import training_device
from tinystories_slm.io.atomic import write_output
from tinystories_slm.io.units import format_duration
from tinystories_slm.sweeps.grid import Axis, SweepRun, expand_sweep, read_axes
from tinystories_slm.sweeps.plots import heat_maps, plot_curve, plot_heat_maps
from tinystories_slm.sweeps.processes import SweepCommand, Task, check_cores, run_tasks
from tinystories_slm.sweeps.results import check_metrics, combine, read_rows
from tinystories_slm.sweeps.scaling import fit_sweep
from tinystories_slm.sweeps.state import (
    RunState,
    card_flags,
    evaluate_flags,
    find_run_dir,
    log_path,
    read_state,
    read_states,
)
from tinystories_slm.sweeps.table import csv_rows, json_record, markdown_page
from tinystories_slm.training.signals import StopRequest

logger = logging.getLogger(__name__)

TABLE = "sweep"
"""Name of the table files, with the endings .md, .csv and .json."""


def sweep(args: SweepArgs) -> None:
    """Train, score and compare the runs of a sweep; a run that is finished is not started again.

    Raises:
        UserError: the sweep file is invalid (nothing was started), or runs failed (the others are finished).
        TrainingInterrupted: a stop signal arrived; every run has saved, and the same command goes on.
    """
    check_cores(args.cores)
    axes, runs = read_axes(args), expand_sweep(args)
    check_metrics(args)
    _check_commands(args, runs)
    groups = _group(runs)
    if args.index is not None:
        if args.index >= len(groups):
            raise UserError(f"index ({args.index}): must be below {len(groups)}, the number of runs")
        groups = groups[args.index : args.index + 1]
    if args.list:
        _print_list(args, groups)
    elif args.estimate:
        _print_estimate(args, runs)
    elif args.prepare:
        _raise_problems(_run(args, groups, only_prepare=True), len(runs))
    elif args.table:
        _write_results(args, axes, runs)
    else:
        _sweep(args, axes, runs, groups)


def _sweep(
    args: SweepArgs, axes: Sequence[Axis], runs: Sequence[SweepRun], groups: Sequence[Sequence[SweepRun]]
) -> None:
    try:
        problems = _run(args, groups)
    finally:
        if args.index is None:  # the tasks of an array job would write it at the same time
            _write_results(args, axes, runs)
    _raise_problems(problems, sum(map(len, groups)))


def _run(
    args: SweepArgs, groups: Sequence[Sequence[SweepRun]], *, only_prepare: bool = False
) -> dict[str, str]:
    """Do what is missing of the runs, and return the problem of each run that failed.

    Raises:
        TrainingInterrupted: a stop signal arrived.
    """
    missing = [[run for run in group if not read_state(args, run).is_complete(args)] for group in groups]
    with StopRequest(stop_on_hangup=True) as stop:
        problems = _prepare(args, [run for group in missing for run in group], stop)
        tasks = [
            [_task(args, run) for run in group if str(run.config.data.data_dir) not in problems]
            for group in missing
        ]
        if not only_prepare:
            run_tasks([group for group in tasks if group], jobs=args.jobs, cores=args.cores, stop=stop)
            problems |= {task.name: task.problem for group in tasks for task in group if task.problem}
    if stop.received:
        raise TrainingInterrupted("the sweep stopped and its runs saved; run the same command to go on")
    return problems


def _prepare(args: SweepArgs, runs: Sequence[SweepRun], stop: StopRequest) -> dict[str, str]:
    """Prepare each folder of data once, and return the problem of each that failed."""
    folders = {str(run.config.data.data_dir): run for run in runs}
    tasks = []
    for folder, run in folders.items():
        if token_file_differences(run.config.data, run.config.tokenizer) == []:
            continue
        command = iter([SweepCommand("prepare_data", run.flags), None])
        tasks.append(Task(folder, log_path(args, f"data-{Path(folder).name}"), command.__next__))
    run_tasks([[task] for task in tasks], jobs=1, cores=(), stop=stop)
    return {task.name: task.problem for task in tasks if task.problem}


def _task(args: SweepArgs, run: SweepRun) -> Task:
    log = log_path(args, find_run_dir(run).name)
    return Task(run.name, log, lambda: _next_command(args, read_state(args, run)))


def _next_command(args: SweepArgs, state: RunState) -> SweepCommand | None:
    """Return what is missing next of a run; None if it is finished."""
    if not state.trained:
        return SweepCommand("train", state.run.flags)
    if state.evaluation is None:
        return SweepCommand("evaluate", tuple(evaluate_flags(args, state.run)))
    if not state.is_complete(args):
        return SweepCommand("report_card", tuple(card_flags(args, state.run)))
    return None


def _group(runs: Sequence[SweepRun]) -> list[list[SweepRun]]:
    """Return the runs in groups that start together: each alone, or with its own baseline."""
    groups: list[list[SweepRun]] = []
    for run in runs:
        if run.is_twin:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _check_commands(args: SweepArgs, runs: Sequence[SweepRun]) -> None:
    """Check the options of `evaluate` and `report_card` before anything starts.

    Raises:
        UserError: an option of `report_card` is unknown or invalid, or is set by the sweep; or a run is
            trained on a mixture, and `evaluation.data` does not name what to score.
    """
    for run in runs:
        if args.evaluation.data is None and run.config.data.source.startswith("["):
            raise UserError("evaluation.data (null): a mixture cannot be scored; set it to one of its parts")
    if isinstance(args.report_card, dict):
        for name in ("model", "output", "arena", "judge_estimate"):
            if name in args.report_card:
                value = args.report_card[name]
                raise UserError(f"report_card.{name} ({value}): cannot be set for a sweep; remove it")
    if args.report_card is not False:
        args_of_card = [flag for flag in card_flags(args, runs[0]) if not flag.startswith("--output=")]
        try:
            parse(ReportCardArgs, args_of_card)
        except UserError as error:
            raise UserError(f"report_card: {error}") from error


def _print_list(args: SweepArgs, groups: Sequence[Sequence[SweepRun]]) -> None:
    for index, group in enumerate(groups):
        for run in group:
            state = read_state(args, run)
            print(f"{index:>4}  {state.path}  {state.text(args)}")
            print(f"      {SweepCommand('train', state.run.flags)}")
    print(f"{len(groups)} to run, at most {args.num_slots} at a time")


def _print_estimate(args: SweepArgs, runs: Sequence[SweepRun]) -> None:
    """Print the estimated duration of each run and of the sweep; runs that differ in the seed are equal."""
    device, total_s = training_device(), 0.0
    found: dict[tuple[tuple[str, str], ...], float] = {}
    for run in runs:
        labels = tuple(run.labels.items())
        if labels not in found:
            config = run.config
            duration_s = estimate_duration(config, device, precision_or_fallback(config, device)).total_s
            limit_s = 60 * (config.train.max_minutes or float("inf"))
            found[labels] = min(duration_s, limit_s)
            print(f"{run.name}: about {format_duration(found[labels])}", flush=True)
        total_s += found[labels]
    print(
        f"{len(runs)} runs: about {format_duration(total_s)} one after another, without the start of each "
        "process, the preparation of data and the scores"
    )


def _write_results(args: SweepArgs, axes: Sequence[Axis], runs: Sequence[SweepRun]) -> None:
    """Write the table and plots into the folder of the sweep, and print the table."""
    rows = read_rows(args, read_states(args, runs))
    combinations, metric = combine(args, rows), args.metrics[0]
    laws = fit_sweep(rows, metric)
    page = markdown_page(args, axes, rows, combinations, laws)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = json_record(args, axes, rows, combinations, laws)
    folder = args.output_dir
    write_output(folder / f"{TABLE}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_output(folder / f"{TABLE}.csv", csv_rows(args, axes, rows))
    write_output(folder / f"{TABLE}.md", page)
    written = [folder / f"{TABLE}.{ending}" for ending in ("md", "csv", "json")]
    if any(one.values(metric) for one in combinations):
        for name in args.metrics:
            maps = heat_maps(axes, combinations, name)
            if maps:
                written.append(folder / f"heat_map_{name}.png")
                plot_heat_maps(maps, name, written[-1])
        if len({row.num_non_embedding_parameters for row in rows if row.metrics}) > 1:
            written.append(folder / f"curve_{metric}.png")
            plot_curve(rows, laws, metric, written[-1])
    print(page, end="")
    logger.info("wrote %s", ", ".join(map(str, written)))


def _raise_problems(problems: dict[str, str], num_runs: int) -> None:
    if problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UserError(f"{len(problems)} of {num_runs} runs failed: {listed}")
