"""Measure generated stories: python scripts/report_card.py --model runs/quickstart/best"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("report_card")
