"""Examine machine and configuration, or a model: python scripts/doctor.py --config configs/9m.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("doctor")
