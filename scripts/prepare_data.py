"""Turn the stories into token files.

python scripts/prepare_data.py --config configs/quickstart.yaml
"""

from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.data.prepare import prepare_data


def main(config: RunConfig) -> None:
    manifest = prepare_data(config.data, config.tokenizer)
    for split, counts in manifest.splits.items():
        print(
            f"{config.data.data_dir / split}.bin: {counts['num_tokens']:,} tokens ({manifest.token_dtype}) "
            f"of {counts['num_stories']:,} stories"
        )
    print("next: scripts/train.py with the same options")


if __name__ == "__main__":
    doorway(main, RunConfig)
