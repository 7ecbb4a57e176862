import subprocess
import sys

import pytest
from conftest import ROOT

WITHOUT_DATASETS = "import sys; sys.modules['datasets'] = None; sys.modules['evaluate'] = None; "


@pytest.mark.parametrize("module", ["tinystories_slm.training", "tinystories_slm.evaluation.likelihood"])
def test_import_does_not_need_datasets(module):
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_DATASETS}import {module}; print('imported')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "imported", done.stderr
