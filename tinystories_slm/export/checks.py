"""Checks that an export must pass before it is moved into place: equal logits, greedy text and token ids."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.errors import UserError
from tinystories_slm.generation.cache_check import cache_error, max_cache_error

DEFAULT_PROMPT = "Once upon a time"
TOKENIZER_TEXTS = (
    DEFAULT_PROMPT,
    "Lily's cat said: \"Don't go!\" 3 times, 2,000 miles away...",
    "  two blanks,\ttab,\n\nlines   and    runs of blanks  ",
    "Zoë's naïve café: 日本語 Ελλάδα Привет",
    "👋🏽 🦊❤️‍🔥 ﬁ e\u0301 \u200b\ufeff\x00\x7f",
    "",
    "<|endoftext|>Once upon a time<|endoftext|>",
    "x1234567890 HELLO's 'll 've're _under_score_ #!?",
)
"""Difficult cases for a tokenizer: contractions, digits, runs of blanks, scripts, emoji, special tokens."""
_NUM_TOKENS = 64
MAX_DIFFERENCE_16_BIT = 0.05
"""Largest difference of two logits, relative to the largest logit, that 16-bit rounding explains.

For models that sum in another order, such as GPT-2 with one product for queries, keys and values. Measured:
0.009 in bfloat16 on CPUs without bfloat16 instructions, 0 on others; 0.55 with positions that are off by one.
"""


@dataclass(frozen=True, kw_only=True)
class EquivalenceCheck:
    """One comparison of an export, as loaded from disk, with the model it was made from."""

    name: str
    """Class or runtime that loaded the export, and the type of its weights: `custom, bfloat16`."""
    max_difference: float
    """Largest absolute difference of two logits."""
    greedy_match: bool
    """Whether greedy decoding generates the same text."""
    max_allowed: float = 0.0
    """Largest `max_difference` that passes. Above 0 the greedy text may differ as well."""
    cache_error: float = 0.0
    """Difference between generation through the cache and one forward pass, relative to the largest logit."""
    max_cache_error: float = 0.0
    """Largest `cache_error` that rounding in the type of the model explains."""
    file: str | None = None
    """The loaded file, if an export stores the weights in several types."""
    token_agreement: float | None = None
    """For rounded weights: share of the tokens of the model's greedy text with the same argmax in both."""

    def __str__(self) -> str:
        match = "the same" if self.greedy_match else "a different"
        line = f"{self.name}: largest logits difference {self.max_difference:.3g}, {match} greedy story"
        if self.token_agreement is None:
            return line
        return f"{line}; same argmax for {self.token_agreement:.1%} of its tokens"


class ExportError(UserError):
    """An export does not compute what the model computes: a fault here, or in a new version of a library."""

    def __init__(self, message: str) -> None:
        remedy = "install another version of transformers, or report this"
        super().__init__(f"{message}, so nothing was written; {remedy}")


def probe_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return token ids (2, T): the start of the model's greedy text, and random tokens.

    T is the context of the model, at most 64: a wrong position or mask shows only late in a text.
    """
    length = min(_NUM_TOKENS, model.config.max_position_embeddings)
    story = greedy_ids(model, encode_default_prompt(tokenizer), length)
    random = torch.randint(
        0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    story += random[: length - len(story)]
    return torch.tensor([story, random])


def encode_default_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `<|endoftext|>Once upon a time`: in training an end token precedes each story."""
    return [tokenizer.eos_token_id, *tokenizer(DEFAULT_PROMPT, add_special_tokens=False).input_ids]


@torch.no_grad()
def greedy_ids(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """Return `prompt` and its greedy continuation, at most `length` ids, up to the model's stop token."""
    prompt = prompt[: length - 1]
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=length - len(prompt),
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    return output[0].tolist()


@torch.no_grad()
def compare(
    name: str,
    model: PreTrainedModel,
    exported: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_relative_difference: float = 0.0,
) -> EquivalenceCheck:
    """Compare logits over `probe_ids` and greedy decoding of two models; never raises `ExportError`.

    `max_relative_difference` is relative to the largest logit; 0 requires equality to the bit.
    """
    ids = probe_ids(model, tokenizer)
    mask = torch.ones_like(ids)  # without a mask transformers warns, as pad and end token share an id
    logits = [network(ids, attention_mask=mask).logits.float() for network in (model, exported)]
    difference = (logits[0] - logits[1]).abs().max().item()
    prompt = encode_default_prompt(tokenizer)
    greedy_match = greedy_ids(model, prompt, ids.shape[1]) == greedy_ids(exported, prompt, ids.shape[1])
    return EquivalenceCheck(
        name=name,
        max_difference=difference,
        greedy_match=greedy_match,
        max_allowed=max_relative_difference * logits[0].abs().max().item(),
        cache_error=cache_error(exported, prompt),
        max_cache_error=max_cache_error(exported.dtype),
    )


def require_equal(check: EquivalenceCheck) -> EquivalenceCheck:
    """Return `check` if the two models are equal to the bit, or as close as `check.max_allowed`.

    Raises:
        ExportError: a logit or a token of the greedy text differs, or generation through the cache
            differs from the exported model's own forward pass.
    """
    if not check.cache_error <= check.max_cache_error:
        raise ExportError(
            f"{check.name}: generation with the cache differs from one forward pass by "
            f"{check.cache_error:.3g} of the largest logit (at most {check.max_cache_error} is allowed)"
        )
    if not check.max_difference <= check.max_allowed:  # also for NaN
        allowed = f"at most {check.max_allowed:.3g} is allowed" if check.max_allowed else "both must be equal"
        raise ExportError(f"{check}; {allowed}")
    if not check.greedy_match and check.max_allowed == 0.0:
        raise ExportError(f"{check}; both must be equal")
    return check


def require_same_ids(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    exported: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool = True,
) -> None:
    """Check that both tokenizers encode `TOKENIZER_TEXTS` to the same ids and decode them to the same text.

    Raises:
        ExportError: the ids or the decoded text of one text differ.
    """
    for text in TOKENIZER_TEXTS:
        expected_ids, exported_ids = (
            each(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
            for each in (tokenizer, exported)
        )
        if expected_ids != exported_ids or tokenizer.decode(expected_ids) != exported.decode(expected_ids):
            raise ExportError(f"{name}: {text!r} is tokenized as {exported_ids}, not as {expected_ids}")
