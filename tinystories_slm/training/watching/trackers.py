"""Where a run can be followed beside its own folder: trackio, TensorBoard or W&B, through Accelerate."""

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

from tinystories_slm.config import RunConfig, as_plain
from tinystories_slm.errors import InputError

logger = logging.getLogger(__name__)

PROJECT = "tinystories_slm"
_INSTALL = {
    "trackio": "pip install 'tinystories_slm[track]'",
    "tensorboard": "pip install 'tinystories_slm[track]'",
    "wandb": "pip install wandb",
}


def tracker_options(config: RunConfig) -> dict[str, Any]:
    """What `Accelerator` has to be told of `train.tracker`.

    Raises:
        InputError: the tracker's package is not installed.
    """
    name = config.train.tracker
    if name == "none":
        return {}
    if name not in map(str, get_available_trackers()):
        raise InputError(
            f"train.tracker ({name}) is not installed; {_INSTALL[name]}, or use none: metrics.jsonl is "
            "written anyway"
        )
    # TensorBoard's files go to this folder and there into one that is named like the project.
    project = ProjectConfiguration(logging_dir=str(config.output_dir))
    return {"log_with": name, "project_config": project}


class Tracker:
    """The tracker of a run at `step`; one that fails costs a warning, never the run.

    Its files go under the run folder (trackio's, unless TRACKIO_DIR is set; W&B's beside what it
    sends). `tracker.json` there names the run to the tracker, so that a resumed run goes on with it.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, *, step: int) -> None:
        self._accelerator, self._name = accelerator, config.train.tracker
        self._working = self._name != "none" and accelerator.is_main_process
        self._warned = False
        self._told_to = 0
        if not self._working:
            return
        state_path = config.output_dir / "tracker.json"
        ids = _read(state_path) if step > 0 else {}
        self._known = self._name in ids
        ids.setdefault(self._name, secrets.token_hex(4))
        with self._surviving("does not start, and the run goes on without it"):
            state_path.write_text(json.dumps(ids), encoding="utf-8")
            self._start(config, ids[self._name])
        if self._warned:
            accelerator.trackers = []  # half begun, it would fail again wherever Accelerate asks it
            self._working = False

    def catch_up(self, lines: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Take in what metrics.jsonl holds of the run so far, which may reach past `step`.

        A tracker that was there has seen it all: the steps that are now done again it is not told twice.
        To one that is new to a resumed run, the lines up to `step` are told first.
        """
        if not self._working:
            return
        if self._known:
            self._told_to = max((line["step"] for line in lines), default=0)
            return
        for line in lines:
            if line["step"] <= step:
                self.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """One line of metrics.jsonl."""
        if self._working and step > self._told_to:
            with self._surviving("could not be told; it is asked again with every line"):
                self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is still to be sent."""
        if not self._working:
            return
        with self._surviving("did not end properly"), _silence():
            for tracker in self._accelerator.trackers:
                tracker.finish()
        self._accelerator.trackers = []  # or `end_training` would finish them again
        self._working = False

    def _start(self, config: RunConfig, run_id: str) -> None:
        run_dir, name = config.output_dir, config.output_dir.absolute().name
        values = flat(as_plain(config))
        project, options, where = PROJECT, {}, f"W&B, offline under {run_dir}/wandb with WANDB_MODE=offline"
        if self._name == "tensorboard":
            where = f"tensorboard --logdir {run_dir.parent}"
            # What an earlier run left here under the same name is hidden from the first step on.
            project, options = "tensorboard", {} if self._known else {"purge_step": 0}
            values = None if self._known else values  # each time makes a row of its own among the runs
        elif self._name == "trackio":
            # Read once, when trackio is imported: all runs of one process share a folder.
            folder = os.environ.setdefault("TRACKIO_DIR", str((run_dir / "trackio").absolute()))
            where = f"TRACKIO_DIR={folder} trackio show --project {PROJECT}"
            resume = "allow" if self._known else "never"
            options = {"name": f"{name}-{run_id}", "resume": resume, "embed": False}
        else:
            options = {"name": name, "id": run_id, "resume": "allow", "dir": str(run_dir)}
        with _silence():
            self._accelerator.init_trackers(project, config=values, init_kwargs={self._name: options})
        logger.info("follow: %s", where)

    @contextlib.contextmanager
    def _surviving(self, outcome: str) -> Iterator[None]:
        """Whatever a tracker raises, its network or its disk, is a warning, once."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("train.tracker (%s) %s: %s", self._name, outcome, reason[:300])
            self._warned = True


def flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with names like `train.lr`."""
    values: dict[str, Any] = {}
    for name, value in plain.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return values


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _silence() -> contextlib.AbstractContextManager:
    """trackio prints how to look at it, without the folder that it would take."""
    return contextlib.redirect_stdout(io.StringIO())
