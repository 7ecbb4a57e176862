"""Count the collective operations of a step, as each process of a launch; see test_communication.py.

The arguments are the configuration, the output file of the main process, and the flags of each case in one
argument. With ACCELERATE_USE_FSDP, the model is sharded: Accelerate does so for GPU processes only, as which
these CPU processes register.
"""

import json
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.training.communication import CommunicationCounter
from tinystories_slm.training.loop import train_step
from tinystories_slm.training.run import start_run


def count_step(config: RunConfig) -> dict:
    """Count the third step: DDP sets the size of its buckets in the second."""
    run = start_run(config)
    with closing(run):
        for _ in range(2):
            train_step(run)
        with CommunicationCounter() as counter:
            update = train_step(run)
        kinds = {type(parameter).__name__ for parameter in run.prepared_model.parameters()}
        record = {
            "type": run.accelerator.distributed_type.value,
            "kinds": sorted(kinds),
            "num_parameters": sum(parameter.numel() for parameter in run.prepared_model.parameters()),
            "num_tensors": len(list(run.prepared_model.parameters())),
            "collectives": counter.collectives,
            "losses": [loss.item() for loss in run.local_losses],
            "grad_norm": float(update["train/grad_norm"]),
        }
    run.accelerator.free_memory()
    return record


def main(config_file: str, output: Path, cases: list[str]) -> None:
    state = PartialState(cpu=True)
    records = {}
    for number, case in enumerate(cases):
        if "ACCELERATE_USE_FSDP" in os.environ:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        config = parse_config(["--config", config_file, *case.split()])
        records[case] = count_step(replace(config, output_dir=config.output_dir / str(number)))
    if state.is_main_process:
        output.write_text(json.dumps(records))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
