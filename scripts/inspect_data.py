"""Show what a step read: python scripts/inspect_data.py --run runs/quickstart --step 1"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("inspect_data")
