"""Matplotlib, imported whatever backend the environment names; figures are drawn without pyplot."""

import contextlib
import os
import sys

# Colab and Jupyter set MPLBACKEND to a module that is not installed here for every `!command`, and matplotlib
# raises while it is imported.
_is_first_import = "matplotlib" not in sys.modules
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend is not None and _is_first_import:
    # For the pyplot of a notebook: matplotlib reads the variable only while it is imported. An unknown
    # name raises ValueError.
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend

__all__ = ["Figure", "FigureCanvasAgg", "LogLocator", "MaxNLocator", "NullLocator"]
