import shutil

import pytest
from cpu_kernels import LEVELS, PYTORCH, compiler_commands, main

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="needs gcc or clang"),
]


def test_quick_benchmark_compares_a_compiler_with_pytorch(capsys):
    main(["--quick"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [compiler_commands()[-1], PYTORCH]
    assert all(
        float(cell.split(", ")[0].replace(",", "")) > 0 for row in rows for cell in row.split(" | ")[1:]
    )


def test_every_level_is_a_flag_of_the_compilers():
    assert set(LEVELS) >= {command.partition("-march=")[2] for command in compiler_commands()}
