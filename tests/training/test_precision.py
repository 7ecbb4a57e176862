import pytest
import torch

from tinystories_slm.errors import InputError
from tinystories_slm.training import precision
from tinystories_slm.training.precision import cpu_bf16_gain, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "gain", "expected"),
    [
        ({"amx_bf16": True}, 8.0, "bf16"),
        ({"avx512_bf16": True}, 2.0, "bf16"),
        ({"avx512_bf16": True}, 0.5, "no"),  # an Intel whose AMX a virtual machine hides
        ({"avx2": True}, 8.0, "no"),  # emulated, whatever a measurement says
        ({}, 8.0, "no"),
    ],
)
def test_auto_is_bf16_only_where_the_cpu_gains_by_it(monkeypatch, capabilities, gain, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(precision, "cpu_bf16_gain", lambda: gain)
    assert resolve_precision("auto", CPU) == expected


def test_the_gain_is_measured_on_one_thread_and_once():
    threads = torch.get_num_threads()
    assert 0.01 < cpu_bf16_gain() < 100
    assert cpu_bf16_gain() == cpu_bf16_gain()
    assert torch.get_num_threads() == threads


def test_what_is_asked_for_is_given_except_what_cannot_work():
    assert [resolve_precision(p, CPU) for p in ("no", "bf16")] == ["no", "bf16"]
    assert resolve_precision("auto", torch.device("mps")) == "no"
    with pytest.raises(InputError, match=r"train.mixed_precision \(fp16\) needs a GPU"):
        resolve_precision("fp16", CPU)
