"""Train, evaluate and generate in one go: python scripts/story.py"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("story")
