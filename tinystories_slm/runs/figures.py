"""Matplotlib, imported whatever backend the environment names; figures are drawn without pyplot."""

import os

# Colab and Jupyter set MPLBACKEND to a module that is not installed here for every `!command`, and matplotlib
# raises while it is imported.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

__all__ = ["Figure", "FigureCanvasAgg", "LogLocator", "MaxNLocator", "NullLocator"]
