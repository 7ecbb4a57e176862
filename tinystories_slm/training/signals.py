"""Stop signals: Ctrl-C, the time limit of a scheduler, preemption of the machine."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # SIGUSR1: Slurm's `--signal`; Windows has none
# The terminal sends Ctrl-C to all processes, and a launcher forwards it again: both count as one request.
_DEBOUNCE_S = 1.0


class StopRequest:
    """Context manager in which the first SIGINT, SIGTERM or SIGUSR1 sets `received`.

    The loop reads `received` between steps.

    Raises:
        KeyboardInterrupt: a second SIGINT arrives more than a second after the first request.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal; None before it."""
        self._received_s = 0.0
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows signal handlers only in the main thread. In another one, such as a notebook's worker,
        # none is installed.
        if threading.current_thread() is threading.main_thread():
            for name in _STOP_SIGNALS:
                if number := getattr(signal, name, None):
                    self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._received_s = name, time.monotonic()
            if int(os.environ.get("RANK", 0)) == 0:
                # Not through a buffered stream: the signal may have interrupted a write to it. The same
                # Ctrl-C may also have ended the `| tee` that reads stderr.
                with contextlib.suppress(OSError):
                    message = f"\n{name}: finishing the step, then saving (Ctrl-C again: stop immediately)\n"
                    os.write(2, message.encode())
        elif name == "SIGINT" and time.monotonic() - self._received_s > _DEBOUNCE_S:
            raise KeyboardInterrupt
