"""Leave a gloo group of one process while its threads free tensors; see test_distributed.py.

Every way out of a run is a fork of this process, so that torch is imported once. Each destruction of the
group finds 500 collectives in flight, whose tensors nothing else holds: the threads of the group need the
GIL to free them. A destructor that holds the GIL then waits for them for ever.
"""

import atexit
import gc
import os
import signal
import socket
import sys
import weakref
from pathlib import Path

import torch
from torch import distributed

from tinystories_slm.config import RunConfig, load_config
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.training import loop
from tinystories_slm.training import run as run_module

_TIMEOUT_S = 90  # a hang


def leave(way: str, config: RunConfig, events_file: Path) -> None:
    """Train, leave by `way`, and write what happened to `events_file`, in this order."""
    events: list[str] = []
    # Functions run in reverse order: after the destruction that follows an error.
    atexit.register(lambda: events_file.write_text(", ".join(events)))
    train_step, build_run, destroy = loop.train_step, run_module._build_run, distributed.destroy_process_group

    def watched_build(*args):
        run = build_run(*args)
        ddp = run.prepared_model
        assert isinstance(ddp, torch.nn.parallel.DistributedDataParallel)
        for name in ("reducer", "logger"):
            weakref.finalize(getattr(ddp, name), events.append, f"{name} freed")
        return run

    def last_step(run):
        if run.progress.step == 3 and way == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if run.progress.step == 3 and way == "error":
            raise UserError("simulated")
        return train_step(run)

    def busy_destroy(group=None):
        values, out = torch.ones(1_000_000), torch.ones(1_000_000)
        for _ in range(500):
            distributed.all_gather([out], values.view(-1), async_op=True)
        events.append("destroy")
        destroy(group)
        events.append(f"{num_gloo_threads()} gloo threads left")

    run_module._build_run, loop.train_step, distributed.destroy_process_group = (
        watched_build, last_step, busy_destroy,
    )  # fmt: skip
    try:
        loop.train(config)
        events.append("end")
    except (TrainingInterrupted, UserError) as error:
        events.append(type(error).__name__)
    gc.collect()


def num_gloo_threads() -> int:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def main(config_file: Path) -> None:
    """Print one line for each way out: its name, its exit code, its events in order."""
    for way in ("end", "stop", "error"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(
            launch | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        )
        events_file = config_file.with_name(f"{way}.txt")
        pid = os.fork()
        if pid == 0:
            signal.alarm(_TIMEOUT_S)
            config = load_config(config_file)
            object.__setattr__(config, "output_dir", config.output_dir / way)
            leave(way, config, events_file)
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"{way}: {code}: {events_file.read_text() if events_file.exists() else 'hung'}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
