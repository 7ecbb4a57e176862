"""Probabilities behind the words of a story, and the tokens that could stand there instead."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Alternative:
    """A token that could stand at a position of the story."""

    token_id: int
    probability: float | None
    """Probability that the model gives it, before temperature, top_k and top_p; None for the first token."""
    text: str
    """Its text after the token before it; the replacement character for a part of a character."""


@dataclass(frozen=True)
class StoryToken:
    """A token of a story."""

    index: int
    """Position in the token ids of the story."""
    token: Alternative
    alternatives: list[Alternative]
    """The most probable tokens at this position, in falling order; empty for the first token."""


@dataclass(frozen=True)
class Word:
    """Tokens that make up a word, a punctuation mark or an end of text, and the blanks before it."""

    text: str
    tokens: list[StoryToken]

    @property
    def probability(self) -> float | None:
        """Product of the probabilities of the tokens; None if the word has the first token."""
        probabilities = [one.token.probability for one in self.tokens]
        return None if None in probabilities else math.prod(probabilities)


def story_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    num_alternatives: int = 5,
    suppressed_ids: Sequence[int] = (),
) -> list[Word]:
    """Return the words of `token_ids` with the probabilities of their tokens.

    One forward pass reads the story; it needs memory for len(token_ids) x V logits. The texts of the words,
    joined, are the decoded story. A special token without text at the start is left out.
    """
    token_ids = list(token_ids)
    pieces = _TokenTexts(tokenizer)
    own, top_ids, top = token_probabilities(model, token_ids, num_alternatives, suppressed_ids)
    tokens = [StoryToken(0, Alternative(token_ids[0], None, pieces.text_after(None, token_ids[0])), [])]
    for index, (previous, token_id) in enumerate(pairwise(token_ids), start=1):
        rated = zip(top_ids[index - 1], top[index - 1], strict=True)
        tokens.append(
            StoryToken(
                index,
                Alternative(token_id, own[index - 1], pieces.text_after(previous, token_id)),
                [Alternative(other, share, pieces.text_after(previous, other)) for other, share in rated],
            )
        )
    return group_words(tokenizer, tokens)


@torch.inference_mode()
def token_probabilities(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    num_alternatives: int,
    suppressed_ids: Sequence[int] = (),
) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """Return the probabilities of tokens 1 to T - 1 of `token_ids` (T,), and the most probable tokens there.

    The other two lists have T - 1 rows of ids and of probabilities, in falling order. A suppressed token has
    probability 0, as in generation.
    """
    if len(token_ids) < 2:
        return [], [], []
    ids = torch.tensor([list(token_ids)], device=model.device)
    logits = model(ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]), use_cache=False).logits[0]
    logits = logits.float()  # (T - 1, V)
    if suppressed_ids:
        logits[:, list(suppressed_ids)] = -math.inf
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    own = (logits.gather(-1, ids[0, 1:, None]) - log_total).exp()[:, 0]
    top, top_ids = logits.topk(min(num_alternatives, logits.shape[-1]), dim=-1)
    return own.tolist(), top_ids.tolist(), (top - log_total).exp().tolist()


def group_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[StoryToken]) -> list[Word]:
    """Group `tokens` into words.

    A word starts at a blank, and where letters and digits follow other characters or the reverse. Tokens that
    hold parts of one character stay in one word. Tokens without text (special ones) are words of their own;
    at the start of the story they are left out.
    """
    words: list[Word] = []
    for text, unit in _whole_characters(tokenizer, tokens):
        if words and text and not _starts_word(words[-1].text, text):
            words[-1] = Word(words[-1].text + text, words[-1].tokens + unit)
        elif text or words:
            words.append(Word(text, unit))
    return words


def _whole_characters(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[StoryToken]
) -> Iterator[tuple[str, list[StoryToken]]]:
    """Yield (text, tokens) of the shortest runs of tokens that end at the end of a character.

    A run ends where the text so far, decoded, is the start of the whole text: inside a character it ends in
    the replacement character instead.
    """
    ids = [one.token.token_id for one in tokens]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    start = num_chars = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if end == len(ids) or (whole.startswith(text) and len(text) >= num_chars):
            yield whole[num_chars : len(text)], list(tokens[start:end])
            start, num_chars = end, len(text)


def _starts_word(before: str, text: str) -> bool:
    if before.isspace():
        # A blank that is a token of its own belongs to the word after it, and a line break to the next one.
        return "\n" in before and not text.isspace()
    if not before or text[0].isspace():
        return True
    return before[-1].isspace() or _has_letters(before) != _has_letters(text)


def _has_letters(text: str) -> bool:
    return any(char.isalnum() for char in text)


class _TokenTexts:
    """Texts of single tokens.

    Tokenizers such as Llama's remove the blank at the start of a text, so that a token is decoded after the
    one before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[tuple[int | None, int], str] = {}

    def text_after(self, previous: int | None, token_id: int) -> str:
        """Return the text that `token_id` adds after `previous`; empty for a special token."""
        key = (previous, token_id)
        if key not in self._texts:
            before = "" if previous is None else self._decode([previous])
            both = self._decode([token_id] if previous is None else [previous, token_id])
            self._texts[key] = both[len(before) :] if both.startswith(before) else self._decode([token_id])
        return self._texts[key]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
