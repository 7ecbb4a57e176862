"""The benchmarks are scripts beside the package; their shared parts are imported as they import them."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
