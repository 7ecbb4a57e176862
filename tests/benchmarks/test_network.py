"""Hosts with a network of their own: training across it, and a host that is cut off."""

import subprocess

import pytest

virtual_network = pytest.importorskip("virtual_network", reason="needs Linux")
import network  # noqa: E402
from random_tokens import write_random_tokens  # noqa: E402


@pytest.fixture(autouse=True)
def _requirements() -> None:
    if reason := virtual_network.missing_requirement():
        pytest.skip(reason)


def test_hosts_reach_one_another_unless_one_is_cut_off():
    link = virtual_network.Link(delay_s=0.05)
    with virtual_network.virtual_network(2, link) as joined:

        def ping() -> subprocess.CompletedProcess:
            connect = (
                "import socket, time\n"
                "names = socket.gethostname(), socket.gethostbyname('host1')\n"
                "start = time.monotonic()\n"
                "try: socket.create_connection(('host1', 7), timeout=3)\n"
                "except ConnectionRefusedError: print(*names, time.monotonic() - start)\n"
            )
            command = joined.hosts[0].command(["python3", "-c", connect])
            return subprocess.run(command, capture_output=True, text=True)

        name, address, seconds = ping().stdout.split()
        assert (name, address) == ("host0", "10.77.0.2")
        assert float(seconds) > 0.1  # there and back
        joined.cut(1)
        assert "TimeoutError" in ping().stderr
        joined.restore(1)
        assert ping().stdout


@pytest.mark.weekly
def test_host_that_is_cut_off_for_good_is_named(tmp_path, fault):
    data = write_random_tokens(tmp_path / "data", vocab_size=network.VOCAB_SIZE, num_tokens=2**16)
    flags = [*data, "--train.max_steps=100000", "--train.timeout_s=10"]
    outcome = network.train(
        tmp_path, flags, 2, virtual_network.Link(), lambda joined: joined.cut(1), timeout_s=120
    )
    assert outcome.codes[0] == 1 and outcome.seconds[0] < 120, outcome.errors
    for host, other in ((0, 1), (1, 0)):
        lines = network.own_lines(outcome.errors[host])
        waiting = f"no progress for 10 s: waiting for process {other} on host{other} (pid"
        assert any(waiting in line for line in lines), (host, outcome.errors[host])
    fault(
        "the network of one of two hosts is cut off for good",
        "both end after train.timeout_s; a line on each names the process and host that it waits for",
    )
