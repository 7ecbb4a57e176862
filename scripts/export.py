"""Write a model for another tool: python scripts/export.py --model RUN/best --format native --output DIR"""

from tinystories_slm.cli import doorway
from tinystories_slm.export import ExportArgs, export

if __name__ == "__main__":
    doorway(export, ExportArgs)
