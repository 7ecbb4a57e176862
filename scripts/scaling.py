"""Fit the law of the loss to a sweep: python scripts/scaling.py --sweep configs/sweeps/scaling.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("scaling")
