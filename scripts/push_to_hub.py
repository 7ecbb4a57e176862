"""Publish a run on the Hub: python scripts/push_to_hub.py --run runs/quickstart --repo_id USER/NAME"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("push_to_hub")
