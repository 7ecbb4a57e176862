"""Show a run on one page: python scripts/report.py --run runs/quickstart"""

from tinystories_slm.cli import doorway
from tinystories_slm.training.watching.report import ReportArgs, report

if __name__ == "__main__":
    doorway(report, ReportArgs)
