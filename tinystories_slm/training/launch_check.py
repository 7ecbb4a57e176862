"""Checks of a launch before it reads or writes anything: do its processes meet, and do they agree?"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
from accelerate.utils import broadcast_object_list, gather_object

from tinystories_slm.config import RunConfig
from tinystories_slm.config.run_config import flatten, to_dict
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.host import package_versions
from tinystories_slm.hardware.launch_env import num_launched_processes, process_rank

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=10)
"""Time for all processes to start; imports from a shared file system may take minutes."""

_CONNECT_S = 40.0
_REPORT_S = 30.0
_MAX_SHOWN = 3


def check_first_host() -> None:
    """Check that the first machine of a launch answers, if this is not its first process.

    Without this check, a wrong address is reported after the time that all processes have to start.

    Raises:
        UserError: the address is no host's, or has not answered for 40 s.
    """
    if process_rank() == 0:
        return
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    end_s = time.monotonic() + _CONNECT_S
    while port.isdigit():
        try:
            socket.create_connection((address, int(port)), timeout=5).close()
            return
        except ConnectionRefusedError:
            return  # the machine answers; its first process is not ready yet
        except OSError as error:
            if time.monotonic() > end_s:
                raise UserError(
                    f"MASTER_ADDR ({address}), port {port}: does not answer ({error.strerror or error}); "
                    "set the address of the first machine, start it, or open the port in its firewall"
                ) from error
            time.sleep(1)


@contextlib.contextmanager
def report_waiting() -> Iterator[None]:
    """Log a line if the block, in which the first process waits for the others, takes longer than 30 s."""
    size = num_launched_processes()
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    minutes = JOIN_TIMEOUT.total_seconds() / 60
    text = f"waiting for the other processes of this launch, {size} in all, at {where}, for {minutes:.0f} min"
    timer = threading.Timer(_REPORT_S, logger.warning, [text])
    timer.daemon = True
    if size > 1 and process_rank() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_same_launch(config: RunConfig) -> None:
    """Check that all processes have the same options and package versions.

    Raises:
        UserError: names the first processes that differ; raised on every process, so that none waits.
    """
    facts = flatten(to_dict(config)) | package_versions()
    check_agreement(facts, "use equal options and packages on all machines")


def check_agreement(facts: Mapping[str, object], fix: str) -> None:
    """Compare `facts` with those of the first process, on every process of the launch.

    Raises:
        UserError: a value differs, for which `fix` is the remedy; raised on every process, so that none
            waits.
    """
    if not torch.distributed.is_initialized():
        return
    [expected] = broadcast_object_list([dict(facts)])
    different = [
        f"{name} ({facts.get(name)}) differs from that of process 0 ({expected.get(name)})"
        for name in {**expected, **facts}
        if facts.get(name) != expected.get(name)
    ]
    where = f"process {process_rank()} on {socket.gethostname()}"
    found = gather_object([f"{where}: {', '.join(different[:_MAX_SHOWN])}"] if different else [])
    if found:
        more = f" and {len(found) - 1} more processes" if len(found) > 1 else ""
        raise UserError(f"{found[0]}{more}; {fix}")
