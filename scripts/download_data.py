"""Get the stories: python scripts/download_data.py --config configs/quickstart.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("download_data")
