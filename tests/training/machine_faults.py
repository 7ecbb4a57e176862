"""Simulate faults of a machine: run as `unshare -rm python machine_faults.py CONFIG FOLDER`.

FOLDER becomes a file system of a few megabytes that only this process sees. Prints the outcome of each
fault as JSON. Not a test by itself: `test_machine_errors.py` runs it and checks the output.
"""

import contextlib
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

from tinystories_slm.config import RunConfig, load_config
from tinystories_slm.errors import UserError
from tinystories_slm.training import loop, train
from tinystories_slm.training.checkpoints import checkpoints, verify_checkpoint


def main(config_path: str, folder: str) -> None:
    _mount(folder, "size=4m")
    config = load_config(Path(config_path))
    report = {
        "full disk": _full_disk(_with(config, output_dir=Path(folder) / "full"), Path(folder)),
        "read-only": _read_only(_with(config, output_dir=Path(folder) / "read_only"), folder),
        "out of memory": _out_of_memory(_with(config, output_dir=Path(folder) / "memory")),
    }
    print(json.dumps(report))


def _full_disk(config: RunConfig, folder: Path) -> dict:
    # All checkpoints are kept, so that they fill the disk.
    error = _error_of(_with(config, keep="newest:100"))
    found = checkpoints(config.output_dir)
    intact = [path.name for path in found if verify_checkpoint(path) is None]
    with contextlib.suppress(OSError), (folder / "rest").open("wb", buffering=0) as rest:
        while True:  # until the last byte is used
            rest.write(bytes(1024))
    start_error = _error_of(_with(config, output_dir=folder / "no_start"))
    _mount(str(folder), "remount,size=64m")
    train(config)
    return {
        "error": error,
        "start error": start_error,
        "found": [path.name for path in found],
        "intact": intact,
        **_end(config),
    }


def _read_only(config: RunConfig, folder: str) -> dict:
    train_step = loop.train_step

    def read_only_step(run):
        if run.progress.step == 5:
            # Mount it again, read-only, on top: the first mount is busy, as the run holds the lock file.
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        return train_step(run)

    loop.train_step = read_only_step
    error = _error_of(config)
    loop.train_step = train_step
    subprocess.run(["umount", folder], check=True)
    train(config)
    return {"error": error, **_end(config)}


def _out_of_memory(config: RunConfig) -> dict:
    huge = _with(config, batch_size=2**15, per_device_batch_size=2**15)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    try:
        return {"error": _error_of(huge)}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _error_of(config: RunConfig) -> str:
    try:
        train(config)
    except UserError as error:
        return str(error)
    return "none"


def _end(config: RunConfig) -> dict:
    return {"end": [path.name for path in checkpoints(config.output_dir)]}


def _with(config: RunConfig, output_dir: Path | None = None, **train_args) -> RunConfig:
    return dataclasses.replace(
        config,
        output_dir=output_dir or config.output_dir,
        train=dataclasses.replace(config.train, **train_args),
    )


def _mount(folder: str, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
