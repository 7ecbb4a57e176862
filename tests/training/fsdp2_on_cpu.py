"""Train with FSDP2 on CPU processes: `train_sharded` runs this file, or a test program that imports it.

FSDP2 itself runs on CPUs, joined by gloo, but Accelerate uses it for GPU processes only. So the CPU
processes register with Accelerate as GPU processes. The rest is Accelerate's and torch's own code.
"""

import os
import signal

from accelerate import PartialState
from accelerate.utils import DistributedType

from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import distributed, loop


def register_as_gpu_processes() -> None:
    init_processes = distributed._init_processes

    def init_as_gpu_processes() -> PartialState:
        state = init_processes()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return state

    distributed._init_processes = init_as_gpu_processes


def stop_at(step: int) -> None:
    """Send SIGTERM to this process at the beginning of the step after `step`."""
    train_step = loop.train_step

    def signalled_step(run):
        if run.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run)

    loop.train_step = signalled_step


def main() -> None:
    register_as_gpu_processes()
    if "STOP_AT" in os.environ:
        stop_at(int(os.environ["STOP_AT"]))
    run_command(loop.train, RunConfig, is_distributed=True)


if __name__ == "__main__":
    main()
