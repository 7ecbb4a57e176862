"""Records of a run: the run directory, metrics, samples, console, trackers and the report."""

import os

# Colab and Jupyter set MPLBACKEND to a module that is not installed here for every `!command`, and matplotlib
# raises while it is imported. Figures are drawn without pyplot, so no backend is needed.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib  # noqa: F401
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
