"""Exposure of the canaries of a run: python scripts/exposure.py --run runs/canaries"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("exposure")
