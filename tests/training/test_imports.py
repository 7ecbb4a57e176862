import subprocess
import sys

from conftest import ROOT

WITHOUT_DATASETS = "import sys; sys.modules['datasets'] = None; sys.modules['evaluate'] = None; "


def test_import_does_not_need_datasets():
    modules = "tinystories_slm.training, tinystories_slm.evaluation.likelihood"
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_DATASETS}import {modules}; print('imported')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "imported", done.stderr
