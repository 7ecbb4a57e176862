"""Make the vocabulary: train a byte-level BPE on the stories, or take an existing tokenizer.

python scripts/train_tokenizer.py --config configs/quickstart.yaml
"""

from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.data.tokenizer import TokenizerRecord, train_tokenizer


def main(config: RunConfig) -> None:
    folder = train_tokenizer(config.data, config.tokenizer)
    record = TokenizerRecord.load(folder / "training.json")
    print(f"{folder}: {record.vocab_size:,} entries, {record.bytes_per_token:.2f} bytes of a story per token")
    print("next: scripts/prepare_data.py with the same options")


if __name__ == "__main__":
    doorway(main, RunConfig)
