"""Export a model: python scripts/export.py --model RUN/best --format native --output exports/native"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("export")
