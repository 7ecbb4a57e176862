"""Put notebooks/ on the import path, for build_notebooks.py."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
