"""Publish a run on the Hub: python scripts/push_to_hub.py --run runs/quickstart --repo_id USER/NAME"""

from tinystories_slm.cli import doorway
from tinystories_slm.hub.push import PushArgs, push

if __name__ == "__main__":
    doorway(push, PushArgs)
