"""Write a run's report: python scripts/report.py --run runs/quickstart"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("report")
