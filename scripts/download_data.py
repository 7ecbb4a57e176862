"""Get the stories, split into training and validation.

python scripts/download_data.py --config configs/quickstart.yaml
"""

from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.data.sources import RawStories, download_data


def main(config: RunConfig) -> None:
    folder = download_data(config.data)
    for split, counts in RawStories.load(folder / "source.json").splits.items():
        dropped = counts["num_empty_dropped"] + counts["num_null_dropped"]
        print(
            f"{folder / split}.parquet: {counts['num_stories']:,} stories, "
            f"{counts['num_bytes'] / 1e6:,.1f} MB, {dropped:,} empty ones dropped"
        )
    print("next: scripts/train_tokenizer.py with the same options")


if __name__ == "__main__":
    doorway(main, RunConfig)
