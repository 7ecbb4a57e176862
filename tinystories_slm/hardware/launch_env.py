"""Environment variables of a launch: which of several processes this one is.

A launcher (`accelerate launch`, `torchrun`, `mpirun`) sets them. A scheduler or a container may leave some of
them behind where no launcher runs.
"""

import os

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZES = (
    *("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS"),
    *("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


def is_launched() -> bool:
    """Whether a launcher started this process: rank, number of processes and address are set."""
    complete = _first_number(_RANKS) is not None and _first_number(_SIZES) is not None
    return complete and bool(os.environ.get("MASTER_ADDR"))


def process_rank() -> int:
    """Return the rank of this process in its launch; 0 without a launcher."""
    return (_first_number(_RANKS) or 0) if is_launched() else 0


def local_process_rank() -> int:
    """Return the rank among the processes of this machine; 0 without a launcher."""
    return (_first_number(_LOCAL_RANKS) or 0) if is_launched() else 0


def num_launched_processes() -> int:
    """Return the number of processes of the launch; 1 without a launcher."""
    return (_first_number(_SIZES) or 1) if is_launched() else 1


def remove_stray_launch_variables() -> dict[str, str]:
    """Remove the variables that are no number, and all of them without a launcher; return what was removed.

    Accelerate parses each of them as a number, and joins processes as soon as one is set.
    """
    launched = is_launched()
    stray = [
        name
        for name in (*_RANKS, *_LOCAL_RANKS, *_SIZES, *_LOCAL_SIZES)
        if name in os.environ and not (launched and _number(name) is not None)
    ]
    return {name: os.environ.pop(name) for name in stray}


def _first_number(names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := _number(name)) is not None), None)


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None
