import subprocess
import sys

import pytest
from conftest import ROOT

_LOAD_OPENMP = """
import sys
sys.argv[0] = "tinystories-slm"  # as a command: the package does not import torch
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config.command_args.reports import ReportArgs

def load_openmp(args):
    assert "torch" not in sys.modules
    import torch

run_command(load_openmp, ReportArgs, ["--run=any"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses GNU OpenMP on Linux")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "4000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
    ],
)
def test_command_limits_how_long_openmp_threads_spin(environment, expected):
    env = {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose", **environment}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_OPENMP], env=env, capture_output=True, text=True, check=True
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch does not use GNU OpenMP here")
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr
