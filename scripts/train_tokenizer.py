"""Train the vocabulary: python scripts/train_tokenizer.py --config configs/quickstart.yaml"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("train_tokenizer")
