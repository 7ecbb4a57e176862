"""Commands of this package in processes of their own, several at a time, and their orderly end."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinystories_slm.errors import UserError
from tinystories_slm.hardware.host import num_usable_cores
from tinystories_slm.training.signals import StopRequest

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_INTERRUPTED = 75
"""Exit code of a run that saved and stopped (`cli.run_command`)."""


@dataclass(frozen=True)
class SweepCommand:
    """A command of this package with its options."""

    name: str
    flags: tuple[str, ...]

    @property
    def argv(self) -> list[str]:
        """Arguments of the process."""
        return [sys.executable, "-m", "tinystories_slm", self.name, *self.flags]

    def __str__(self) -> str:
        return shlex.join(["python", "-m", "tinystories_slm", self.name, *self.flags])


@dataclass
class Task:
    """Commands that run one after another; each is chosen when the one before has ended."""

    name: str
    log: Path
    """File that their output is appended to."""
    next_command: Callable[[], SweepCommand | None]
    """Returns what is to be run next; None at the end. It may raise `UserError`."""
    problem: str | None = None
    """Error in one line that ended the task."""
    done: bool = False
    """Whether nothing is left to do."""
    process: subprocess.Popen | None = None
    slot: int | None = None
    _command: SweepCommand | None = field(default=None, repr=False)

    def advance(self, slot: int | None, environment: dict[str, str]) -> None:
        """Start the next command, on core `slot`; without one the task is done."""
        self.slot = slot
        try:
            command = self.next_command()
        except UserError as error:
            self.problem = str(error)
            return
        if command is None:
            self.done = True
            return
        if command == self._command:
            self.problem = f"{command.name} ended without an error, but its result is not there"
            return
        self._command = command
        logger.info("%s: %s", self.name, command)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {command}\n")
            log.flush()
            self.process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=None if slot is None else lambda: os.sched_setaffinity(0, {slot}),
            )

    def collect(self, *, is_stopping: bool) -> bool:
        """Return whether the process has ended; if it failed, and not because of a stop, note why."""
        code = self.process.poll()
        if code is None:
            return False
        self.process = None
        if code and not is_stopping:
            self.problem = last_line(self.log) if code == _INTERRUPTED else self._failure(code)
        return True

    def _failure(self, code: int) -> str:
        """Return the error of the log; one that the process could not write is added to it."""
        line = last_line(self.log)
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        problem = f"{self._command.name}: {ended}" + ("" if line.startswith("$ ") else f" ({line[:200]})")
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\nerror: {problem}\n")
        return problem


def run_tasks(
    groups: Sequence[Sequence[Task]], *, jobs: int, cores: Sequence[int], stop: StopRequest
) -> None:
    """Run the tasks of each group at the same time, and as many groups as there are slots.

    Slots are `cores`, or `jobs` without cores. A failed task ends no other one. At the first stop signal,
    every process receives SIGTERM, and no command starts; a second Ctrl-C raises KeyboardInterrupt.
    """
    slots: deque[int | None] = deque(cores or [None] * jobs)
    environment = _environment(len(slots), pinned=bool(cores))
    pending, active, is_stopping = deque(groups), [], False
    try:
        while active or (pending and not stop.received):
            while pending and not stop.received and len(pending[0]) <= len(slots):
                for task in pending.popleft():
                    task.advance(slots.popleft(), environment)
                    active.append(task)
            if stop.received and not is_stopping:
                is_stopping = True
                for task in active:
                    if task.process:
                        task.process.terminate()
            for task in list(active):
                has_ended = task.process is not None and task.collect(is_stopping=bool(stop.received))
                if has_ended and not (task.problem or stop.received):
                    task.advance(task.slot, environment)
                if task.process is None:
                    active.remove(task)
                    slots.append(task.slot)
            time.sleep(_POLL_S)
    finally:
        for task in active:
            if task.process:
                task.process.kill()
                task.process.wait()


def _environment(num_slots: int, *, pinned: bool) -> dict[str, str]:
    """Return the environment of the processes: they share the cores instead of each using all of them."""
    environment = dict(os.environ)
    if pinned:
        environment["OMP_NUM_THREADS"] = "1"
    elif num_slots > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_usable_cores() // num_slots)))
    return environment


def check_cores(cores: Sequence[int]) -> None:
    """Check that processes can be held on `cores`.

    Raises:
        UserError: this system cannot do it, or a core does not exist or is not allowed.
    """
    if not cores:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"cores ({cores}): needs Linux; use --jobs {len(cores)}")
    allowed = os.sched_getaffinity(0)
    if outside := sorted(set(cores) - allowed):
        raise UserError(f"cores ({outside[0]}): must be among {', '.join(map(str, sorted(allowed)))}")


def last_line(path: Path) -> str:
    """Return the last line of a log that is not empty; empty without the file."""
    if not path.is_file():
        return ""
    # A progress bar ends its lines with a carriage return.
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
