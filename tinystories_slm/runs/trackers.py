"""Experiment trackers through Accelerate: trackio, TensorBoard and W&B."""

import contextlib
import io
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from tinystories_slm.config import RunConfig, flatten, to_dict
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import write_text
from tinystories_slm.runs.run_dir import RunDir

logger = logging.getLogger(__name__)

PROJECT = "tinystories_slm"
_INSTALL = {
    "trackio": "pip install 'tinystories_slm[track]'",
    "tensorboard": "pip install 'tinystories_slm[track]'",
    "wandb": "pip install wandb",
}


def tracker_options(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of `Accelerator` for `train.tracker`.

    Raises:
        UserError: the package of the tracker is not installed.
    """
    name = config.train.tracker
    if name == "none":
        return {}
    if name not in map(str, get_available_trackers()):
        raise UserError(
            f"train.tracker ({name}) is not installed; {_INSTALL[name]}, or use none: metrics.jsonl is "
            "always written"
        )
    # TensorBoard writes to a subdirectory of this one, named after the project.
    project = ProjectConfiguration(logging_dir=str(config.output_dir))
    return {"log_with": name, "project_config": project}


class Tracker:
    """Log a run to its tracker; an error of the tracker logs a warning and never stops the run.

    The tracker writes into the run directory (trackio: unless TRACKIO_DIR is set; W&B: in addition to
    what it uploads). `tracker.json` stores the run id, so that a resumed run continues it.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, *, step: int) -> None:
        self._accelerator, self._name = accelerator, config.train.tracker
        self._enabled = self._name != "none" and accelerator.is_main_process
        self._has_warned = False
        self._last_logged_step = 0
        if not self._enabled:
            return
        state_path = RunDir(config.output_dir).tracker
        run_ids = _read_run_ids(state_path) if step > 0 else {}
        self._resumed = self._name in run_ids
        run_ids.setdefault(self._name, secrets.token_hex(4))
        with self._suppress_errors("failed to start; training continues without it"):
            write_text(state_path, json.dumps(run_ids))
            self._start(config, run_ids[self._name])
        if self._has_warned:
            accelerator.trackers = []  # each call to a half-initialized tracker would fail again
            self._enabled = False

    def backfill(self, lines: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Prepare a run resumed at `step`, from its lines of metrics.jsonl, which may go past `step`.

        A tracker that already has the run gets no line twice: it skips repeated steps. A tracker that
        is new to the run gets the lines up to `step`.
        """
        if not self._enabled:
            return
        if self._resumed:
            self._last_logged_step = max((line["step"] for line in lines), default=0)
            return
        for line in lines:
            if line["step"] <= step:
                self.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log a line of metrics.jsonl, unless its step was logged in an earlier session."""
        if self._enabled and step > self._last_logged_step:
            with self._suppress_errors("failed to log; it is tried again with every line"):
                self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and close the tracker."""
        if not self._enabled:
            return
        with self._suppress_errors("failed to close"), _redirect_stdout():
            for tracker in self._accelerator.trackers:
                tracker.finish()
        self._accelerator.trackers = []  # otherwise `end_training` closes them again
        self._enabled = False

    def _start(self, config: RunConfig, run_id: str) -> None:
        run_dir, name = config.output_dir, config.output_dir.absolute().name
        # Trackers take single values; the rules of data.exclude are a list.
        values: dict[str, Any] | None = {
            key: str(value) if isinstance(value, list) else value
            for key, value in flatten(to_dict(config)).items()
        }
        project, options = PROJECT, {}
        if self._name == "tensorboard":
            location = f"tensorboard --logdir {run_dir.parent}"
            # A new run hides the events that an earlier run left in the same directory.
            project, options = "tensorboard", {} if self._resumed else {"purge_step": 0}
            values = None if self._resumed else values  # each session would add a row of hyperparameters
        elif self._name == "trackio":
            # trackio reads this once, at import: all runs of a process share a directory.
            folder = os.environ.setdefault("TRACKIO_DIR", str((run_dir / "trackio").absolute()))
            location = f"TRACKIO_DIR={folder} trackio show --project {PROJECT}"
            resume = "allow" if self._resumed else "never"
            options = {"name": f"{name}-{run_id}", "resume": resume, "embed": False}
        else:
            location = f"W&B, or {run_dir}/wandb with WANDB_MODE=offline"
            options = {"name": name, "id": run_id, "resume": "allow", "dir": str(run_dir)}
        with _redirect_stdout():
            self._accelerator.init_trackers(project, config=values, init_kwargs={self._name: options})
        logger.info("tracker: %s", location)

    @contextlib.contextmanager
    def _suppress_errors(self, outcome: str) -> Iterator[None]:
        """Log the first error of the tracker, its network or its disk as a warning; ignore the others."""
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("train.tracker (%s) %s: %s", self._name, outcome, reason[:300])
            self._has_warned = True


def _read_run_ids(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _redirect_stdout() -> contextlib.AbstractContextManager:
    """Hide the command that trackio prints: it lacks the directory. Our log line has both."""
    return contextlib.redirect_stdout(io.StringIO())
