"""Train a model: accelerate launch scripts/train.py --config configs/debug.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("train")
