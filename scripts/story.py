"""The whole way at once: python scripts/story.py --config configs/quickstart.yaml"""

from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.pipeline import story

if __name__ == "__main__":
    doorway(story, RunConfig)
