import os
import platform
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from tinystories_slm.hardware import host
from tinystories_slm.hardware.host import (
    describe_hardware,
    installed_version,
    num_physical_cores,
    num_usable_cores,
    package_versions,
    processor_name,
)


def test_describe_hardware_names_processor_and_gpu(monkeypatch):
    monkeypatch.setattr(host, "processor_name", lambda: "AMD EPYC")
    monkeypatch.setattr(host, "num_usable_cores", lambda: 2)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(total=25.2e9))
    assert describe_hardware(torch.device("cpu")) == "AMD EPYC, 2 cores, 23 GB"
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert describe_hardware(torch.device("cuda")) == "NVIDIA H200, 140 GB, AMD EPYC, 2 cores, 23 GB"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_num_usable_cores_follows_the_affinity_of_the_process():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert num_usable_cores() == num_physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_usable_cores() == len(allowed)


def test_num_physical_cores_excludes_hyper_threads(monkeypatch):
    monkeypatch.setattr(host, "num_usable_cores", lambda: 16)
    monkeypatch.setattr(host.psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    assert num_physical_cores() == 8


def test_processor_name_falls_back_to_the_architecture(monkeypatch, tmp_path):
    monkeypatch.setattr(host.platform, "system", lambda: "Linux")
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host, "Path", lambda name: tmp_path / "cpuinfo")
    assert processor_name() == "aarch64"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD  EPYC 9B14\nflags\t: avx2\n")
    assert processor_name() == "AMD EPYC 9B14"


def test_package_versions_reports_unknown_if_not_installed(monkeypatch):
    monkeypatch.setattr(host, "_PACKAGES", ("torch", "not-installed"))
    assert package_versions() == {
        "python": platform.python_version(),
        "torch": version("torch"),
        "not-installed": "unknown",
    }
    assert installed_version("not-installed") is None
