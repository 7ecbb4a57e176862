"""State of the runs of a sweep, read from their run directories alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from tinystories_slm.config import parse
from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.config.flags import to_flags
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import PROTOCOL
from tinystories_slm.model_folder import weights_sha256
from tinystories_slm.runs.run_dir import RunDir, read_json_object
from tinystories_slm.sweeps.grid import SweepRun
from tinystories_slm.sweeps.processes import last_line
from tinystories_slm.training import is_finished
from tinystories_slm.training.checkpoints import check_same_run, checkpoint_step, checkpoints

CARD = "report_card.html"
"""File name of the report card in a run directory; its figures are beside it."""
LOGS = "logs"
"""Folder of the output of the runs' commands, in the folder of the sweep."""


@dataclass(frozen=True)
class RunState:
    """State of a run, as its directory holds it."""

    run: SweepRun
    path: Path
    trained: bool = False
    evaluation: dict[str, Any] | None = None
    """Scores of the weights in best/; None if they are missing or of other weights or stories."""
    card: dict[str, Any] | None = None
    """Figures of the report card of the same weights; None if it is missing or not requested."""
    step: int = 0
    """Step of the newest checkpoint."""
    problem: str | None = None
    """Error in one line that ended the last attempt, or that the next one would end with."""

    def text(self, args: SweepArgs) -> str:
        """Return the state in a few words."""
        if self.is_complete(args):
            return "finished"
        if self.problem:
            return f"failed: {self.problem}"
        if self.trained:
            return "trained, not scored" if self.evaluation is None else "scored, no report card"
        return f"{self.step} of {self.run.config.train.max_steps} steps" if self.step else "missing"

    def is_complete(self, args: SweepArgs) -> bool:
        """Whether nothing is missing of the run."""
        has_card = self.card is not None or args.report_card is False
        return self.trained and self.evaluation is not None and has_card


def read_state(args: SweepArgs, run: SweepRun) -> RunState:
    """Return the state of `run`, with its configuration at the folder where it is or will be."""
    path = find_run_dir(run)
    config = replace(run.config, output_dir=path)
    flags = (*run.flags[:-1], f"--output_dir={path}")
    state = RunState(replace(run, config=config, flags=flags), path, problem=_logged_error(args, path.name))
    found = checkpoints(path)
    state = replace(state, step=checkpoint_step(found[-1]) if found else 0)
    try:
        # Training restores best/ from a checkpoint if it is missing.
        if not is_finished(config) or not RunDir(path).best.is_dir():
            return state
        evaluation = _read_evaluation(args, state.run)
        card = _read_card(args, state.run) if evaluation is not None else None
    except UserError as error:
        return replace(state, problem=str(error))
    return replace(state, trained=True, evaluation=evaluation, card=card)


def find_run_dir(run: SweepRun) -> Path:
    """Return the directory that holds this run, or the first one that holds none: NAME, NAME.2, NAME.3 ...

    A directory of the same name with another configuration, of an earlier sweep file, is kept.
    """
    first = run.config.output_dir
    further = (first.with_name(f"{first.name}.{number}") for number in count(2))
    return next(path for path in chain([first], further) if _can_hold(path, run))


def _can_hold(path: Path, run: SweepRun) -> bool:
    """Whether the directory holds no run, or this one."""
    if not RunDir(path).config.is_file():
        return True
    try:
        check_same_run(run.config, path)
    except UserError:
        return False
    return True


def evaluate_flags(args: SweepArgs, run: SweepRun) -> list[str]:
    """Return the options of `evaluate` for the model of a run."""
    data, given = run.config.data, args.evaluation
    options: dict[str, Any] = {"model": RunDir(run.config.output_dir).best, "data": given.data}
    options |= {"subset": given.subset, "split": given.split, "text_column": given.text_column}
    if given.data is None:
        options |= {"data": data.source, "subset": data.subset, "text_column": data.text_column}
    options |= {"max_stories": given.max_stories, "batch_size": given.batch_size}
    output = RunDir(run.config.output_dir).evaluation
    return to_flags(
        {name: value for name, value in options.items() if value is not None} | {"output": output}
    )


def card_flags(args: SweepArgs, run: SweepRun) -> list[str]:
    """Return the options of `report_card` for the model of a run."""
    run_dir = RunDir(run.config.output_dir)
    given = args.report_card if isinstance(args.report_card, dict) else {}
    return to_flags({"model": run_dir.best, **given, "output": run_dir.path / CARD})


def _read_evaluation(args: SweepArgs, run: SweepRun) -> dict[str, Any] | None:
    """Return evaluation.json if it scores the weights in best/ on the stories of the sweep."""
    run_dir = RunDir(run.config.output_dir)
    found = run_dir.read_evaluation()
    given = args.evaluation
    expected = {
        "weights_sha256": weights_sha256(run_dir.best),
        "data": given.data or run.config.data.source,
        "subset": run.config.data.subset if given.data is None else given.subset,
        "split": given.split,
        "protocol": PROTOCOL,
    }
    num_split = found.get("num_split_stories") or 0
    num_stories = num_split if given.max_stories is None else min(given.max_stories, num_split)
    is_current = all(found.get(name) == value for name, value in expected.items())
    return found if is_current and found.get("num_stories") == num_stories and "intervals" in found else None


def _read_card(args: SweepArgs, run: SweepRun) -> dict[str, Any] | None:
    """Return the figures of the report card if they are of the weights in best/ and of these options."""
    if args.report_card is False:
        return None
    run_dir = RunDir(run.config.output_dir)
    figures = read_json_object((run_dir.path / CARD).with_suffix(".json"))
    if not figures:
        return None
    options = parse(ReportCardArgs, card_flags(args, run))
    own = figures["sets"][0]
    is_current = (
        (own["model"] or {}).get("weights_sha256") == weights_sha256(run_dir.best)
        and own["num_stories"] == options.num_stories
        and figures["seed"] == options.seed
        and figures["sampling"] == asdict(options.sampling())
        and ("judge" in figures) == (options.judge is not None)
    )
    return figures if is_current else None


def log_path(args: SweepArgs, name: str) -> Path:
    """Return the file for the output of the commands of a run directory."""
    return args.output_dir / LOGS / f"{name}.log"


def _logged_error(args: SweepArgs, name: str) -> str | None:
    line = last_line(log_path(args, name))
    return line.removeprefix("error: ") if line.startswith("error: ") else None


def read_states(args: SweepArgs, runs: Sequence[SweepRun]) -> list[RunState]:
    """Return the state of each run."""
    return [read_state(args, run) for run in runs]
