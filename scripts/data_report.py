"""Describe the stories: python scripts/data_report.py --config configs/quickstart.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("data_report")
