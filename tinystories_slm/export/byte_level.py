"""GPT-2's byte-level BPE: the check that a tokenizer is one, and the bytes of its tokens."""

import json

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tinystories_slm.errors import UserError


def require_byte_level_bpe(tokenizer: PreTrainedTokenizerBase, export_format: str) -> dict:
    """Return the contents of tokenizer.json.

    Raises:
        UserError: the tokenizer is not GPT-2's byte-level BPE, which the readers of the format compute.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pieces = backend["model"], backend["pre_tokenizer"] or {}
    matches_gpt2 = {
        "model": model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("ignore_merges"),
        "normalizer": backend["normalizer"] is None,
        "pre_tokenizer": pieces.get("type") == "ByteLevel"
        and pieces.get("use_regex", True)
        and not pieces.get("add_prefix_space"),
    }
    if different := [name for name, matches in matches_gpt2.items() if not matches]:
        raise UserError(
            f"the tokenizer's {' and '.join(different)} is not that of GPT-2's byte-level BPE, the only one "
            f"that --format {export_format} supports; use --format native and a converter of the other tool"
        )
    return backend


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes of each token by its id; those of an added token are its text."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    return {
        id_: token.encode("utf-8") if id_ in added else bytes(byte_of[character] for character in token)
        for token, id_ in tokenizer.get_vocab().items()
    }
