"""Stop signals: Ctrl-C, the time limit of a scheduler, preemption of the machine; and a closed terminal."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

from tinystories_slm.hardware.launch_env import process_rank

# Slurm's `--signal` sends what a job script names, such as SIGUSR1 or SIGUSR2; a limit of CPU time sends
# SIGXCPU; Windows sends SIGBREAK for Ctrl-Break. No platform has all of them.
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
_HANGUP = "SIGHUP"
# The terminal sends Ctrl-C to all processes, and a launcher forwards it again: both count as one request.
_DEBOUNCE_S = 1.0


class StopRequest:
    """Context manager in which the first stop signal sets `received`, and SIGHUP sets `hung_up`.

    The loop reads both between steps. With `stop_on_hangup`, SIGHUP is a stop signal as well. A program
    started with `nohup` ignores SIGHUP.

    Raises:
        KeyboardInterrupt: a second SIGINT arrives more than a second after the first request.
    """

    def __init__(self, *, stop_on_hangup: bool = False) -> None:
        self.received: str | None = None
        """Name of the first stop signal; None before it."""
        self.hung_up = False
        """Whether the terminal has closed and nothing has been saved since; the loop resets it."""
        self._stop_on_hangup = stop_on_hangup
        self._received_s = 0.0
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows signal handlers only in the main thread. In another one, such as a notebook's worker,
        # none is installed.
        if threading.current_thread() is threading.main_thread():
            for name in _STOP_SIGNALS:
                self._install(name)
            if hasattr(signal, _HANGUP) and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                self._install(_HANGUP)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _install(self, name: str) -> None:
        if number := getattr(signal, name, None):
            self._previous_handlers[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == _HANGUP and not self._stop_on_hangup:
            if not self.hung_up:
                self.hung_up = True
                _write_message(f"{name}: finishing the step, then saving; the run goes on")
        elif self.received is None:
            self.received, self._received_s = name, time.monotonic()
            _write_message(f"{name}: finishing the step, then saving (Ctrl-C again: stop immediately)")
        elif name == "SIGINT" and time.monotonic() - self._received_s > _DEBOUNCE_S:
            raise KeyboardInterrupt


def _write_message(message: str) -> None:
    """Write a line to standard error on the main process.

    Not through a buffered stream: the signal may have interrupted a write to it. The same Ctrl-C may also
    have ended the `| tee` that reads stderr, and after SIGHUP there is no terminal.
    """
    if process_rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())
