"""Put benchmarks/ on the import path, as a benchmark script does."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
