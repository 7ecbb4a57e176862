"""Out of a run, in the form that a tool wants: `scripts/export.py`."""

from tinystories_slm.export.checks import Check, ExportError
from tinystories_slm.export.formats import ExportArgs, export

__all__ = ["Check", "ExportArgs", "ExportError", "export"]
