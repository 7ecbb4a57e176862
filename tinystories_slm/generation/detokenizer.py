"""Decode generated tokens to text one at a time."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

# Tokens before the new ones that decide their text: a character that the prompt begins, a blank that some
# tokenizers remove at the start of a text.
_NUM_CONTEXT_TOKENS = 8


class IncrementalDetokenizer:
    """Text of the tokens after a prompt, in pieces of whole characters, without special tokens.

    The joined results of `add` and `flush` are the end of the text of prompt and tokens.

    Args:
        tokenizer: a tokenizer with a `backend_tokenizer`, as all that are loaded from a tokenizer.json.
        prompt_ids: token ids of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._num_characters = 0
        for token in prompt_ids[-_NUM_CONTEXT_TOKENS:]:
            self.add(token)

    def add(self, token: int) -> str:
        """Return the characters that `token` completes; empty if it ends inside a character."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._num_characters += len(piece)
        return piece

    def flush(self) -> str:
        """Return replacement characters for an incomplete character at the end; the last call."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._num_characters :]
