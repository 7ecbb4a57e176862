"""Train a model: accelerate launch scripts/train.py --config configs/debug.yaml"""

from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.training import train

if __name__ == "__main__":
    doorway(train, RunConfig)
