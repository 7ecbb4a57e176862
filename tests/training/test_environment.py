import getpass
import json
import platform
import socket
from importlib.metadata import version
from types import SimpleNamespace

import torch
from accelerate.utils import DistributedType

from tinystories_slm.hardware import host
from tinystories_slm.hardware.host import describe_hardware
from tinystories_slm.hardware.peak import PeakFlops
from tinystories_slm.training import environment
from tinystories_slm.training.environment import write_environment
from tinystories_slm.training.runtime import RuntimeSettings

_CPU = torch.device("cpu")
_RUNTIME = RuntimeSettings("bf16", "matmul", False, True, 4, 2, "glibc, retain freed memory")


def test_environment_json_has_hardware_runtime_and_packages(tmp_path):
    kind = DistributedType.MULTI_CPU
    accelerator = SimpleNamespace(device=_CPU, num_processes=2, mixed_precision="bf16", distributed_type=kind)
    path = write_environment(tmp_path, accelerator, _RUNTIME, PeakFlops(2e11, "measured: somehow"))
    written = json.loads(path.read_text())
    assert path == tmp_path / "environment.json"
    assert written["packages"].pop("python") == platform.python_version()
    assert written["packages"].pop("torch") == version("torch")
    assert set(written.pop("packages")) == {
        "transformers", "accelerate", "tokenizers", "datasets", "tinystories_slm",
    }  # fmt: skip
    assert written.pop("hardware") == describe_hardware(_CPU)
    assert written == {
        "first_step": 1,
        "device": "cpu",
        "num_processes": 2,
        "distributed_type": "MULTI_CPU",
        "mixed_precision": "bf16",
        "compile": False,
        "fused_kernels": True,
        "attention": "matmul",
        "per_device_batch_size": 4,
        "num_threads": 2,
        "allocator": "glibc, retain freed memory",
        "peak_flops_per_second": 2e11,
        "peak_source": "measured: somehow",
    }


def test_environment_json_keeps_the_machines_of_earlier_sessions(tmp_path, monkeypatch):
    """A run trained on one machine and finished on another was not trained on the second."""
    accelerator = SimpleNamespace(
        device=_CPU, num_processes=1, mixed_precision="no", distributed_type=DistributedType.NO
    )

    def start(hardware: str, first_step: int, peak: float = 1.0) -> list[tuple[int, str]]:
        monkeypatch.setattr(environment, "describe_hardware", lambda device: hardware)
        path = write_environment(tmp_path, accelerator, _RUNTIME, PeakFlops(peak, "x"), first_step=first_step)
        newest = json.loads(path.read_text())
        return [
            (session["first_step"], session["hardware"])
            for session in [*newest.get("earlier_sessions", []), newest]
        ]

    assert start("H100", 1) == start("H100", 1) == start("H100", 101, peak=2.0) == [(1, "H100")]
    assert start("laptop", 301) == start("laptop", 401) == [(1, "H100"), (301, "laptop")]
    assert start("H100", 501) == [(1, "H100"), (301, "laptop"), (501, "H100")]
    assert start("laptop", 301) == [(1, "H100"), (301, "laptop")]  # from an earlier checkpoint
    for damaged in (
        "damaged",
        '{"earlier_sessions": 3}',
        '{"first_step": "x"}',
        '{"earlier_sessions": ["x"]}',
    ):
        (tmp_path / "environment.json").write_text(damaged)
        assert start("laptop", 301) == [(301, "laptop")]


def test_environment_json_names_no_host_user_or_path(tmp_path):
    kind = DistributedType.NO
    accelerator = SimpleNamespace(device=_CPU, num_processes=1, mixed_precision="no", distributed_type=kind)
    text = write_environment(tmp_path, accelerator, _RUNTIME, PeakFlops(1.0, "x")).read_text()
    words = text.replace('"', " ").replace(",", " ").split()
    assert socket.gethostname() not in words and getpass.getuser() not in words
    assert "/" not in text


def test_describe_hardware_names_gpu_cpu_and_memory(monkeypatch):
    monkeypatch.setattr(host, "processor_name", lambda: "AMD EPYC")
    monkeypatch.setattr(host, "num_usable_cores", lambda: 2)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(total=25.2e9))
    assert describe_hardware(_CPU) == "AMD EPYC, 2 cores, 23 GB"
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert describe_hardware(torch.device("cuda")) == "NVIDIA H200, 140 GB, AMD EPYC, 2 cores, 23 GB"
