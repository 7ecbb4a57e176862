"""Run a command: options from the command line, log lines on standard error, an exit code at the end."""

import contextlib
import errno
import faulthandler
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from tinystories_slm.config import parse
from tinystories_slm.errors import PROCESS_LOST_EXIT_CODE, ProcessLost, TrainingInterrupted, UserError
from tinystories_slm.hardware.launch_env import local_process_rank, num_launched_processes, process_rank
from tinystories_slm.hardware.openmp import limit_spinning
from tinystories_slm.io.file_errors import ENVIRONMENT_ERRORS, file_error, system_errno

Args = TypeVar("Args")

# A process of a launch that is done and has not exited after this time is ended.
_EXIT_TIMEOUT_S = 60
# Messages of a bare RuntimeError from torch's CPU allocator.
_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory")


def run_command(
    main: Callable[[Args], Any],
    args_type: type[Args],
    argv: Sequence[str] | None = None,
    *,
    is_distributed: bool = False,
) -> None:
    """Parse `argv` (default: the command line), run `main`, and end with one line and an exit code.

    0: done; 2: `UserError`, a full disk or too little memory; 69: `ProcessLost`; 75: `TrainingInterrupted`
    after saving, the same command resumes; 130: interrupted.
    """
    _prepare_streams()
    limit_spinning()
    # Each machine of a launch has its own log.
    is_main = not is_distributed or local_process_rank() == 0
    try:
        with _console_logging(not is_distributed or process_rank() == 0):
            main(parse(args_type, argv))
        sys.stdout.flush()  # so that a closed pipe shows here
    except UserError as error:
        if is_main:
            _write_stderr(f"error: {_one_line(error)}")
        sys.exit(2)
    except ProcessLost as error:
        if is_main:
            _write_stderr(f"error: {error}")
        sys.exit(PROCESS_LOST_EXIT_CODE)
    except TrainingInterrupted as stop:
        if is_main:
            _write_stderr(str(stop))
        sys.exit(75)
    except KeyboardInterrupt:
        _write_stderr("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # `| head`: the reader closed the pipe
        _discard(sys.stdout)
        sys.exit(141)  # as shells report it, like 130 above
    except Exception as error:
        if (machine_error := _machine_error(error)) is None:
            raise
        if is_main:
            _write_stderr(f"error: {machine_error}")
        sys.exit(2)
    finally:
        if is_distributed and num_launched_processes() > 1:
            # The launcher waits for every process, for ever. This timer needs no GIL.
            faulthandler.dump_traceback_later(_EXIT_TIMEOUT_S, exit=True, file=2)


def _prepare_streams() -> None:
    """Replace closed standard streams by the null device, and show letters that stdout lacks as escapes.

    A closed stream (`>&-`) is None, and the next file that is opened would get its descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    """Send what `stream` still holds to the null device: Python flushes at exit and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _machine_error(error: Exception) -> UserError | None:
    """Return the error in one line if the machine or a path is its cause, and None for a bug."""
    if _is_out_of_memory(error):
        reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        return UserError(f"out of memory{reason}; use a smaller batch size or a smaller model")
    if system_errno(error) not in ENVIRONMENT_ERRORS:
        return None
    if filename := getattr(error, "filename", None):
        return file_error(str(filename), error)
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
    return file_error("standard output or a temporary file cannot be written to", error)


def _one_line(error: UserError) -> str:
    r"""Return the message with the line ends and control characters of a value as escapes (`\n`)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # of torch, which is not imported here
        or (isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY_MESSAGES))
    )


def _write_stderr(line: str) -> None:
    """Write a line to standard error; a closed pipe (`| tee` after Ctrl-C) or a full disk is not an error."""
    try:
        tqdm.write(line, file=sys.stderr)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):  # no reader, or the terminal was closed
            _discard(sys.stderr)


@contextlib.contextmanager
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
