"""End the processes of a launch if one of them no longer advances, and name it.

Without it, the others wait in a collective operation until the timeout of half an hour.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
from torch.distributed import distributed_c10d

from tinystories_slm.errors import PROCESS_LOST_EXIT_CODE
from tinystories_slm.hardware.launch_env import local_process_rank

# For the stacks of a stalled process, and for the other processes to find it as well.
_GRACE_S = 2.0


class Heartbeat(NamedTuple):
    """State of a process, which it publishes several times within the timeout."""

    num_beats: int
    """Times that it was published."""
    num_advances: int
    """Micro-batches that the process has started."""
    step: int
    """Optimizer steps that it has finished."""
    is_paused: bool
    """Whether the launch evaluates, saves or waits for a stream: nothing advances."""
    host: str
    pid: int


class StallDetector:
    """Finds the processes that hold up a launch, from their heartbeats."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._last: dict[int, Heartbeat] = {}
        self._beat_s: dict[int, float] = {}
        """Time of the last change of `num_beats` by rank."""
        self._advance_s: float | None = None
        """Time of the last change of any `num_advances`."""
        self._update_s: float | None = None

    def update(self, heartbeats: Mapping[int, Heartbeat], now_s: float) -> list[int]:
        """Return the ranks that hold up the launch at the time `now_s`; empty if none does.

        A process whose heartbeats stop was killed or stopped, or its machine is lost. If all beat and none
        advances, those with the fewest micro-batches hold up the others, which wait for them in a collective
        operation.
        """
        # This process itself was stopped and continues: its clock went on.
        if self._update_s is not None and now_s - self._update_s > self.timeout_s / 2:
            self._beat_s, self._advance_s = dict.fromkeys(self._beat_s, now_s), now_s
        self._update_s = now_s
        for rank, beat in heartbeats.items():
            last = self._last.get(rank)
            if last is None or last.num_beats != beat.num_beats:
                self._beat_s[rank] = now_s
            if last is None or last.num_advances != beat.num_advances or beat.is_paused:
                self._advance_s = now_s
            self._last[rank] = beat
        silent = [rank for rank in heartbeats if now_s - self._beat_s[rank] >= self.timeout_s]
        if silent or self._advance_s is None or now_s - self._advance_s < self.timeout_s:
            return silent
        fewest = min(beat.num_advances for beat in heartbeats.values())
        return [rank for rank, beat in heartbeats.items() if beat.num_advances == fewest]

    def message(self, stalled: list[int]) -> str:
        """Return the line that names the processes `stalled`."""
        names = [
            f"process {rank} on {self._last[rank].host} (pid {self._last[rank].pid}) at step "
            f"{self._last[rank].step}"
            for rank in stalled
            if rank in self._last
        ]
        return (
            f"no progress for {self.timeout_s:.0f} s: waiting for {', '.join(names) or 'process 0'}; "
            "the run ends, saved files are intact; run the same command to resume"
        )


class Watchdog:
    """Context manager in which a thread of each process watches the others.

    If the launch is held up for `timeout_s` seconds, one line names the processes that hold it up. Those that
    still run print their stacks, and every process ends with exit code 69.

    The processes exchange heartbeats through the store of the process group, so the thread neither needs a
    collective operation nor disturbs one. A call of the store does not return if the host of the first
    process is cut off from the network, so another thread makes the calls. A launch of one process has no
    watchdog.
    """

    def __init__(self, timeout_s: float, is_paused: Callable[[], bool]) -> None:
        self._timeout_s = timeout_s
        self._is_paused = is_paused
        self._interval_s = min(1.0, timeout_s / 8)
        self._num_advances, self._step = 0, 0
        self._first_step: int | None = None
        self._is_waiting = False
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: torch.distributed.Store | None = None
        self._heartbeats: dict[int, Heartbeat] = {}
        self._rank, self._world_size = 0, 1
        self._num_exchanges, self._is_store_lost = 0, False

    def advance(self, step: int) -> None:
        """Count a micro-batch of the step after `step`."""
        if self._first_step is None:
            self._first_step = step
        self._step = step
        self._num_advances += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block, which waits for something else than a process."""
        self._is_waiting = True
        yield
        self._is_waiting = False

    def __enter__(self) -> "Watchdog":
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            self._store = distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(seconds=self._timeout_s))
            self._publish(num_beats=0)  # before a fault of the loop can stop the thread
            self._threads = [
                threading.Thread(target=self._exchange_heartbeats, name="heartbeats", daemon=True),
                threading.Thread(target=self._watch, name="watchdog", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:  # before the process group ends
            thread.join(timeout=self._timeout_s)

    def _exchange_heartbeats(self) -> None:
        """Publish and read heartbeats."""
        keys = [f"watchdog/{rank}" for rank in range(self._world_size)]
        try:
            while not self._stop.wait(self._interval_s):
                self._publish(self._num_exchanges + 1)
                published = self._store.multi_get(keys)
                self._num_exchanges += 1
                self._heartbeats = {i: Heartbeat(*json.loads(text)) for i, text in enumerate(published)}
        except RuntimeError:  # the first process, which holds the store, has ended
            self._is_store_lost = True

    def _watch(self) -> None:
        detector, store = StallDetector(self._timeout_s), StallDetector(self._timeout_s)
        while not self._stop.wait(self._interval_s):
            now_s = time.monotonic()
            # The exchange of this process counts as a heartbeat of the first one, which holds the store.
            exchange = Heartbeat(self._num_exchanges, 0, 0, True, "", 0)
            stalled = [0] if self._is_store_lost else store.update({0: exchange}, now_s)
            stalled = stalled or detector.update(self._heartbeats, now_s)
            if stalled and not self._stop.is_set():
                self._end_process(stalled, detector)

    def _publish(self, num_beats: int) -> None:
        # The first step compiles kernels, which may take minutes.
        is_first = self._first_step is None or self._step == self._first_step
        heartbeat = Heartbeat(
            num_beats,
            self._num_advances,
            self._step,
            self._is_paused() or self._is_waiting or is_first,
            socket.gethostname(),
            os.getpid(),
        )
        self._store.set(f"watchdog/{self._rank}", json.dumps(heartbeat))

    def _end_process(self, stalled: list[int], detector: StallDetector) -> None:
        others = [rank for rank in range(self._world_size) if rank not in stalled]
        # A host that is cut off from the first process has a line of its own.
        is_cut_off = stalled == [0] and self._rank != 0 and local_process_rank() == 0
        if self._rank == min(others or stalled) or is_cut_off:
            os.write(2, f"\n{detector.message(stalled)}\n".encode())
        if self._rank in stalled:
            sys.stderr.flush()
            faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(_GRACE_S)
        os._exit(PROCESS_LOST_EXIT_CODE)
