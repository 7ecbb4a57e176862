import pytest
import torch

from tinystories_slm.errors import UserError
from tinystories_slm.training import precision
from tinystories_slm.training.precision import cpu_bf16_speedup, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "speedup", "expected"),
    [
        ({"amx_bf16": True}, 8.0, "bf16"),
        ({"avx512_bf16": True}, 2.0, "bf16"),
        ({"avx512_bf16": True}, 0.5, "no"),  # an Intel CPU whose AMX a virtual machine hides
        ({"avx2": True}, 8.0, "no"),  # emulated bf16, whatever the measurement
        ({}, 8.0, "no"),
    ],
)
def test_auto_is_bf16_only_if_it_is_faster_on_the_cpu(monkeypatch, capabilities, speedup, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(precision, "cpu_bf16_speedup", lambda: speedup)
    assert resolve_precision("auto", CPU) == expected


def test_speedup_is_measured_on_one_thread_and_once():
    threads = torch.get_num_threads()
    assert 0 < cpu_bf16_speedup() < 1000  # without bf16 instructions a product takes a hundred times longer
    assert cpu_bf16_speedup() == cpu_bf16_speedup()
    assert torch.get_num_threads() == threads


def test_configured_precision_is_used_and_fp16_on_cpu_raises():
    assert [resolve_precision(p, CPU) for p in ("no", "bf16")] == ["no", "bf16"]
    assert resolve_precision("auto", torch.device("mps")) == "no"
    with pytest.raises(UserError, match=r"train.mixed_precision \(fp16\) needs a GPU"):
        resolve_precision("fp16", CPU)
