"""Export of a trained model to the formats of other tools."""

from tinystories_slm.config.command_args.publish import ExportArgs
from tinystories_slm.export.checks import EquivalenceCheck, ExportError
from tinystories_slm.export.exporters import export

__all__ = ["EquivalenceCheck", "ExportArgs", "ExportError", "export"]
