"""Being asked to stop: by Ctrl-C, by a scheduler whose time is up, by a machine that is taken away."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

_ASKING = ("SIGINT", "SIGTERM", "SIGUSR1")  # SIGUSR1: Slurm's `--signal`; Windows has none
# A launcher passes Ctrl-C on to its processes, which the terminal has told already: one request.
_SAME_REQUEST_S = 1.0


class StopRequest:
    """While entered: the first SIGINT, SIGTERM or SIGUSR1 sets `received`, to be looked at between steps.

    Raises:
        KeyboardInterrupt: on a second SIGINT, more than a second after the first request.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """The signal's name."""
        self._received_s = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals; elsewhere (a notebook's worker) none are.
        if threading.current_thread() is threading.main_thread():
            for name in _ASKING:
                if number := getattr(signal, name, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._received_s = name, time.monotonic()
            if int(os.environ.get("RANK", 0)) == 0:
                # Not through a buffered stream, which may be what was interrupted; and the same Ctrl-C
                # may have ended the `| tee` that reads it.
                with contextlib.suppress(OSError):
                    os.write(
                        2, f"\n{name}: finishing the step, then saving (Ctrl-C again: stop now)\n".encode()
                    )
        elif name == "SIGINT" and time.monotonic() - self._received_s > _SAME_REQUEST_S:
            raise KeyboardInterrupt
