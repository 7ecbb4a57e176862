"""Turn stories into token files: python scripts/prepare_data.py --config configs/quickstart.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("prepare_data")
