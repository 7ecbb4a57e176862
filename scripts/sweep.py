"""Train and compare many models: python scripts/sweep.py --config configs/sweeps/tiny.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("sweep")
