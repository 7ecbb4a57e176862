"""Run a command: options from the command line, log lines on standard error, an exit code at the end."""

import errno
import faulthandler
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from tinystories_slm.config import parse
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.hardware.launch_env import local_process_rank, num_launched_processes, process_rank

Args = TypeVar("Args")

# A process of a launch that is done and has not exited after this time is ended.
_EXIT_TIMEOUT_S = 60


def run_command(
    main: Callable[[Args], Any],
    args_type: type[Args],
    argv: Sequence[str] | None = None,
    *,
    is_distributed: bool = False,
) -> None:
    """Parse `argv` (default: the command line), run `main`, and end with one line and an exit code.

    0: done; 2: `UserError`; 75: `TrainingInterrupted` after saving, the same command resumes; 130:
    interrupted.
    """
    # Each machine of a launch has its own log.
    is_main = not is_distributed or local_process_rank() == 0
    try:
        with _console_logging(not is_distributed or process_rank() == 0):
            main(parse(args_type, argv))
        sys.stdout.flush()  # so that a closed pipe shows here
    except UserError as error:
        if is_main:
            _write_stderr(f"error: {error}")
        sys.exit(2)
    except TrainingInterrupted as stop:
        if is_main:
            _write_stderr(str(stop))
        sys.exit(75)
    except KeyboardInterrupt:
        _write_stderr("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # `| head`: the reader closed the pipe
        # Python flushes standard output again at exit, and would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as shells report it, like 130 above
    finally:
        if is_distributed and num_launched_processes() > 1:
            # The launcher waits for every process, for ever. This timer needs no GIL.
            faulthandler.dump_traceback_later(_EXIT_TIMEOUT_S, exit=True, file=2)


def _write_stderr(line: str) -> None:
    """Write a line to standard error; a closed pipe (`| tee` after Ctrl-C) or a full disk is not an error."""
    try:
        tqdm.write(line, file=sys.stderr)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):  # no reader, or the terminal was closed
            # Python flushes again at exit; its failure would change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def _console_logging(is_main: bool) -> Iterator[None]:
    """Log the package's messages to standard error without a prefix, around any progress bar.

    Rank 0 of a distributed launch logs from INFO, the other ranks from WARNING.
    """
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("tinystories_slm")
    log.addHandler(handler)
    log.setLevel(logging.INFO if is_main else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _TqdmHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _write_stderr(self.format(record))
