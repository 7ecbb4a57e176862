import platform
import shutil

import pytest
import torch
from cpu_kernels import LEVELS, PYTORCH, compiler_commands, main

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="needs gcc or clang"),
]


@pytest.mark.weekly
def test_quick_benchmark_compares_a_compiler_with_pytorch(capsys):
    main(["--quick"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [compiler_commands()[-1], PYTORCH]
    assert all(
        float(cell.split(", ")[0].replace(",", "")) > 0 for row in rows for cell in row.split(" | ")[1:]
    )


def test_levels_are_those_of_the_processor(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "gcc" else None)
    every = dict.fromkeys((name for needed in LEVELS.values() for name in needed), True)
    for lacking, levels in (("", [*LEVELS]), ("avx512_dq", [*LEVELS][:2]), ("sse4_2", [*LEVELS][1:])):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda lacking=lacking: every | {lacking: False})
        assert compiler_commands() == [f"gcc -march={level}" for level in [*levels, "native"]]


def test_torch_knows_the_names_of_the_instructions():
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the levels are those of x86-64")
    assert {name for needed in LEVELS.values() for name in needed} <= torch.cpu.get_capabilities().keys()
