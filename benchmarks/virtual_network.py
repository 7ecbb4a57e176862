"""Hosts with a network of their own on one Linux machine: namespaces, joined by a switch in this process.

Each host has a network card (a tap device). The switch reads every frame and passes it on after the time that
a link of the stated rate and delay needs; it can lose frames, and cut a host off. The kernel's own emulation
(tc netem) is a module that many machines lack. TCP, routes and sockets are the kernel's. Needs root.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
# Large frames: at 100 Mbit/s a switch in Python passes 1,400 of them each second and host.
_MTU = 9000
# Frames that wait longer for their turn are dropped, as by a full buffer.
_MAX_QUEUE_S = 0.2


def missing_requirement() -> str | None:
    """Return why hosts cannot be made here; None if they can."""
    missing = [name for name in ("ip", "unshare") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access("/dev/net/tun", os.W_OK):
        return "no /dev/net/tun"
    name = f"test{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this container cannot create network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class Link:
    """The link between each host and the switch."""

    bits_per_s: float = 100e6
    delay_s: float = 0.0
    """Of a frame from one host to another."""
    loss: float = 0.0
    """Share of the frames that are lost."""


@dataclass(frozen=True)
class Host:
    """A network namespace with an address and a name, which the other hosts can look up."""

    name: str
    address: str
    namespace: str
    hosts_file: Path

    def command(self, arguments: Sequence[str | Path]) -> list[str]:
        """Return the command that runs `arguments` on this host."""
        setup = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        enter = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            setup,
            "sh",
        ]
        return [*enter, str(self.hosts_file), self.name, *map(str, arguments)]


class Network:
    """Hosts and the switch between them; `sent_bytes` counts the frames that each host has sent."""

    def __init__(self, hosts: list[Host], taps: list[int], link: Link) -> None:
        self.hosts, self.link = hosts, link
        self.sent_bytes = [0] * len(hosts)
        self._taps = taps
        self._is_cut = [False] * len(hosts)
        self._random = random.Random(0)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self, host: int) -> None:
        """Drop every frame from and to `host`: its cable is pulled out of the switch."""
        self._is_cut[host] = True

    def restore(self, host: int) -> None:
        """Undo `cut`."""
        self._is_cut[host] = False

    def close(self) -> None:
        """Stop the switch."""
        self._is_stopped = True
        self._thread.join()
        for tap in self._taps:
            os.close(tap)

    def _run(self) -> None:
        queue: list[tuple[float, int, int, bytes]] = []  # due time, number, receiver, frame
        free_s, numbers = [0.0] * len(self._taps), count()
        while not self._is_stopped:
            wait_s = min(0.2, max(0.0, queue[0][0] - time.monotonic())) if queue else 0.2
            for tap in select.select(self._taps, [], [], wait_s)[0]:
                sender = self._taps.index(tap)
                for frame in _read_frames(tap):
                    self.sent_bytes[sender] += len(frame)
                    now_s = time.monotonic()
                    free_s[sender] = max(free_s[sender], now_s)
                    if free_s[sender] - now_s > _MAX_QUEUE_S:
                        continue
                    free_s[sender] += 8 * len(frame) / self.link.bits_per_s
                    for receiver in self._receivers(sender, frame):
                        entry = (free_s[sender] + self.link.delay_s, next(numbers), receiver, frame)
                        heapq.heappush(queue, entry)
            while queue and queue[0][0] <= time.monotonic():
                _, _, receiver, frame = heapq.heappop(queue)
                if not self._is_cut[receiver]:
                    os.write(self._taps[receiver], frame)

    def _receivers(self, sender: int, frame: bytes) -> list[int]:
        """Return the hosts that receive `frame`: one by its address, all others of a broadcast."""
        if self._is_cut[sender] or self._random.random() < self.link.loss:
            return []
        if frame[0] & 1:
            return [each for each in range(len(self._taps)) if each != sender]
        return [frame[5]] if frame[5] < len(self._taps) else []


def _read_frames(tap: int) -> Iterator[bytes]:
    for _ in range(32):  # then the queue has its turn
        try:
            yield os.read(tap, 2**16)
        except BlockingIOError:
            return


@contextlib.contextmanager
def virtual_network(num_hosts: int, link: Link) -> Iterator[Network]:
    """Make `num_hosts` hosts named host0, host1, ... in a network of their own; remove them at the end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        addresses = [f"10.77.0.{number + 1}" for number in range(num_hosts)]
        hosts_file = Path(folder) / "hosts"
        lines = [f"{address} host{number}" for number, address in enumerate(addresses)]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        hosts, taps = [], []
        for number, address in enumerate(addresses):
            namespace = f"tinystories{os.getpid()}-{number}"
            _ip("netns", "add", namespace)
            stack.callback(_remove, namespace)
            taps.append(_open_tap(namespace))
            inside = ("-n", namespace)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}", "mtu", str(_MTU))
            _ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            hosts.append(Host(f"host{number}", address, namespace, hosts_file))
        network = Network(hosts, taps, link)
        stack.callback(network.close)
        yield network


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _remove(namespace: str) -> None:
    """End the processes of a namespace, and remove it."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "del", namespace)


def _open_tap(namespace: str) -> int:
    """Create the card eth0 in `namespace` and return the descriptor of its frames."""
    opened: list[int] = []

    def open_inside() -> None:
        with open(f"/run/netns/{namespace}") as file:  # setns moves this thread alone
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
        opened.append(tap)

    thread = threading.Thread(target=open_inside)
    thread.start()
    thread.join()
    return opened[0]
