import os
import platform
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from tinystories_slm.hardware import host
from tinystories_slm.hardware.host import (
    cpu_features,
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


ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd {features}
CPU implementer\t: 0x41
CPU part\t: {part}
"""


def test_cpu_features_differ_between_processors_of_arm_and_macs(monkeypatch, tmp_path):
    monkeypatch.setattr(host.platform, "system", lambda: "Linux")
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(host.platform, "node", lambda: "node7")
    assert cpu_features() == ("aarch64", "node7")  # no /proc: only this machine may load its kernels
    assert host.loaded_libraries() == []

    def linux(**fields: str) -> tuple[str, ...]:
        (tmp_path / "cpuinfo").write_text(ARM.format(**fields) * 2)
        return cpu_features()

    graviton = linux(features="sve", part="0xd40")
    assert graviton == (
        "aarch64", "CPU implementer\t: 0x41", "CPU part\t: 0xd40", "Features\t: fp asimd sve"
    )  # fmt: skip
    assert len({graviton, linux(features="sve2", part="0xd40"), linux(features="sve", part="0xd4f")}) == 3

    printed = "machdep.cpu.brand_string: Apple M1\nhw.optional.arm.FEAT_BF16: 0\n"
    monkeypatch.setattr(host.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(host.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=printed))
    assert cpu_features() == ("aarch64", "hw.optional.arm.FEAT_BF16: 0", "machdep.cpu.brand_string: Apple M1")
    assert processor_name() == "Apple M1"


def test_package_versions_reports_unknown_if_not_installed(monkeypatch):
    monkeypatch.setattr(host, "_PACKAGES", ("torch", "not-installed"))
    assert package_versions() == {
        "python": platform.python_version(),
        "torch": version("torch"),
        "not-installed": "unknown",
    }
    assert installed_version("not-installed") is None
