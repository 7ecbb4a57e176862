"""Prepared data of random token ids, to measure speed without a corpus."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.provenance import Provenance
from tinystories_slm.data.sources.file_formats import END_OF_TEXT
from tinystories_slm.data.token_files import Manifest, TokenCounts
from tinystories_slm.data.tokenizer import TokenizerManifest, save_tokenizer
from tinystories_slm.io.atomic import file_sha256

SOURCE = "random-ids"
"""`data.source` of such a folder; its token files exist, so the source is never read."""
_STORY_TOKENS = 200


def write_random_tokens(folder: Path, *, vocab_size: int, num_tokens: int, seed: int = 0) -> list[str]:
    """Write `folder` as `prepare_data` would, and return the flags of train.py that select it.

    Ids follow Zipf's law, as words do: the frequency of an embedding decides how fast its gradient is summed.
    """
    data = DataArgs(source=SOURCE, data_dir=folder)
    provenance = Provenance.from_args(data, "random")
    (folder / "tokenizer").mkdir(parents=True)
    save_tokenizer(_tokenizer(vocab_size), folder / "tokenizer")
    record = TokenizerManifest(
        provenance=provenance,
        pretrained=None,
        requested_vocab_size=vocab_size,
        sample_max_stories=TokenizerArgs().max_stories,
        num_stories=0,
        vocab_size=vocab_size,
        eos_token_id=0,
        tokenizer_sha256=file_sha256(folder / "tokenizer" / "tokenizer.json"),
        bytes_per_token=4.0,
    )
    record.save(folder / "tokenizer" / "training.json")
    token_dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    rng = np.random.default_rng(seed)
    sizes = {"train": num_tokens, "validation": 20 * _STORY_TOKENS}
    for split, size in sizes.items():
        ids = _zipf(rng, size, vocab_size)
        ids[_STORY_TOKENS - 1 :: _STORY_TOKENS] = record.eos_token_id
        ids.astype(np.dtype(token_dtype).newbyteorder("<")).tofile(folder / f"{split}.bin")
    Manifest(
        provenance=provenance,
        tokenizer_sha256=record.tokenizer_sha256,
        vocab_size=vocab_size,
        eos_token_id=record.eos_token_id,
        token_dtype=token_dtype,
        splits={
            split: TokenCounts(num_stories=size // _STORY_TOKENS, num_tokens=size, num_bytes=4 * size)
            for split, size in sizes.items()
        },
        code_version="random",
    ).save(folder / "manifest.json")
    return [f"--data.source={SOURCE}", f"--data.data_dir={folder}", f"--tokenizer.vocab_size={vocab_size}"]


def _zipf(rng: np.random.Generator, size: int, vocab_size: int) -> np.ndarray:
    """Return ids from 1, int64 (size,); rank r has the weight 1 / (r + 2.7), Mandelbrot's form of the law."""
    cumulative = np.cumsum(1.0 / (np.arange(1, vocab_size) + 2.7))
    return 1 + np.searchsorted(cumulative, rng.random(size) * cumulative[-1])


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes; all other ids have names that occur in no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [END_OF_TEXT, *alphabet, *(f"<{number}>" for number in range(vocab_size))][:vocab_size]
    bpe = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
