import pytest
import torch

from tinystories_slm.errors import InputError
from tinystories_slm.training.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "no"), ({}, "no")],
)
def test_auto_is_bf16_only_where_the_cpu_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == expected


def test_what_is_asked_for_is_given_except_what_cannot_work():
    assert [resolve_precision(p, CPU) for p in ("no", "bf16")] == ["no", "bf16"]
    assert resolve_precision("auto", torch.device("mps")) == "no"
    with pytest.raises(InputError, match=r"train.mixed_precision \(fp16\) needs a GPU"):
        resolve_precision("fp16", CPU)
