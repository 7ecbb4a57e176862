"""A real Slurm on this machine, in a temporary folder: munged, slurmctld, and slurmd for two nodes."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")

# Limits and waiting times are short; a requeued job starts again after 5 s instead of two minutes.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2
SchedulerType=sched/backfill
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_requirement() -> str | None:
    """Return why a cluster cannot be started here; None if it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed: run make slurm"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    try:
        list(map(socket.gethostbyname, NODES))
    except OSError:
        return "n1 and n2 are not in /etc/hosts: run make slurm"
    return None


class Cluster:
    """A running cluster; `folder` holds its configuration and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        (self.folder / "state").mkdir(parents=True)
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        host = socket.gethostname().split(".")[0]
        text = _CONFIGURATION.format(folder=self.folder, host=host, ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))
        files = {
            "key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed",
        }  # fmt: skip
        flags = [f"--{flag}={self.folder}/munge.{suffix}" for flag, suffix in files.items()]
        self.run("munged", "--force", *flags)
        self.run("slurmctld")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.run("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], 60)

    def start_node(self, node: str) -> None:
        """Start the daemon of `node`."""
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of `node` and every process of its jobs, as a power failure does."""
        spool = str(self.folder / f"spool-{node}")
        pids = [int((self.folder / f"slurmd-{node}.pid").read_text())]
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ProcessLookupError):
                environment = (process / "environ").read_bytes()
                command = (process / "cmdline").read_bytes()
                if f"SLURMD_NODENAME={node}\0".encode() in environment or (
                    b"slurmstepd" in command and spool.encode() in environment
                ):
                    pids.append(int(process.name))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End all jobs and daemons."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
            self.run("scancel", "--user=root")
        for path in [*self.folder.glob("slurmd-*.pid"), *self.folder.glob("*.pid")]:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a command of Slurm and return its output.

        Raises:
            CalledProcessError: the command failed.
        """
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def submit(self, *arguments: str | Path, cwd: Path | None = None) -> int:
        """Submit a job and return its number."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd))

    def show(self, job: int) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", str(job))))

    def wait(self, job: int, *, timeout: float = 240) -> dict[str, str]:
        """Wait for the end of a job and return its fields."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        wait_until(lambda: self.show(job)["JobState"] in ended, timeout)
        return self.show(job)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster, and stop it at the end of the block."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    """Wait until `condition()` is true.

    Raises:
        TimeoutError: it is not after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not after {timeout:.0f} s")
        time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
