import getpass
import json
import platform
import socket
from importlib.metadata import version
from types import SimpleNamespace

import torch

from tinystories_slm.training.settings import Settings
from tinystories_slm.training.watching import environment
from tinystories_slm.training.watching.environment import hardware, write_environment
from tinystories_slm.training.watching.estimate import Peak

_CPU = torch.device("cpu")
_SETTINGS = Settings("bf16", "matmul", False, True, 4, 2, "glibc's, keeping what is freed")


def test_what_a_run_is_computed_on_and_with_is_written_down(tmp_path):
    accelerator = SimpleNamespace(device=_CPU, num_processes=2, mixed_precision="bf16")
    path = write_environment(tmp_path, accelerator, _SETTINGS, Peak(2e11, "measured: so and so"))
    written = json.loads(path.read_text())
    assert path == tmp_path / "environment.json"
    assert written["packages"].pop("python") == platform.python_version()
    assert written["packages"].pop("torch") == version("torch")
    assert set(written.pop("packages")) == {
        "transformers", "accelerate", "tokenizers", "datasets", "tinystories_slm",
    }  # fmt: skip
    assert written.pop("hardware") == hardware(_CPU)
    assert written == {
        "device": "cpu",
        "num_processes": 2,
        "mixed_precision": "bf16",
        "compile": False,
        "fused_kernels": True,
        "attention": "matmul",
        "per_device_batch_size": 4,
        "num_threads": 2,
        "allocator": "glibc's, keeping what is freed",
        "peak_flops_per_second": 2e11,
        "peak_source": "measured: so and so",
    }


def test_it_names_nobody(tmp_path):
    accelerator = SimpleNamespace(device=_CPU, num_processes=1, mixed_precision="no")
    text = write_environment(tmp_path, accelerator, _SETTINGS, Peak(1.0, "x")).read_text()
    words = text.replace('"', " ").replace(",", " ").split()
    assert socket.gethostname() not in words and getpass.getuser() not in words
    assert "/" not in text


def test_the_hardware_is_named_as_people_name_it(monkeypatch):
    monkeypatch.setattr(environment, "_processor", lambda: "AMD EPYC")
    monkeypatch.setattr(environment, "_num_cores", lambda: 2)
    monkeypatch.setattr(environment.psutil, "virtual_memory", lambda: SimpleNamespace(total=25.2e9))
    assert hardware(_CPU) == "AMD EPYC, 2 cores, 23 GB"
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert hardware(torch.device("cuda")) == "NVIDIA H200, 140 GB, AMD EPYC, 2 cores, 23 GB"
