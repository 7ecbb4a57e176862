"""What an export has to show before it is called done: the same logits, the same story, the same ids."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.generation.cache_check import cache_error, max_cache_error

PROMPT = "Once upon a time"
TEXTS = (
    PROMPT,
    "Lily's cat said: \"Don't go!\" 3 times, 2,000 miles away...",
    "  two blanks,\ttab,\n\nlines   and    runs of blanks  ",
    "Zoë's naïve café: 日本語 Ελλάδα Привет",
    "👋🏽 🦊❤️‍🔥 ﬁ e\u0301 \u200b\ufeff\x00\x7f",
    "",
    "<|endoftext|>Once upon a time<|endoftext|>",
    "x1234567890 HELLO's 'll 've're _under_score_ #!?",
)
"""What a tokenizer can get wrong: contractions, digits, runs of blanks, scripts, emoji, special tokens."""
_NUM_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of an export, as re-loaded from disk, with the model it came from."""

    name: str
    """What was loaded how: `native, bfloat16`."""
    max_difference: float
    """The largest absolute difference of two logits."""
    same_text: bool
    """Whether the likeliest token each time tells the same story."""
    cache_error: float = 0.0
    """How far generation through the cache is from one forward pass, relative to the largest logit."""
    max_cache_error: float = 0.0
    """The largest `cache_error` that rounding in the model's type explains."""
    file: str | None = None
    """The file that was loaded, where an export holds several forms of the weights."""
    agreement: float | None = None
    """Where weights are rounded: of the model's own story, the share of tokens that is likeliest to both."""

    def __str__(self) -> str:
        text = "the same" if self.same_text else "another"
        line = f"{self.name}: largest logits difference {self.max_difference:.3g}, {text} greedy story"
        return (
            line
            if self.agreement is None
            else f"{line}; {self.agreement:.1%} of its tokens likeliest to both"
        )


class ExportError(RuntimeError):
    """An export does not compute what the model does: a fault of ours, or of a library's new version."""


def probe_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (2, T): the beginning of a story by the model itself, and tokens drawn at random.

    T is the model's context, at most 64: a wrong position or mask shows late in a text.
    """
    length = min(_NUM_TOKENS, model.config.max_position_embeddings)
    story = greedy_ids(model, story_start(tokenizer), length)
    random = torch.randint(
        0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    story += random[: length - len(story)]
    return torch.tensor([story, random])


def story_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`<|endoftext|>Once upon a time` as ids: how stories began in training."""
    return [tokenizer.eos_token_id, *tokenizer(PROMPT, add_special_tokens=False).input_ids]


@torch.no_grad()
def greedy_ids(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """`prompt` and its likeliest continuation, `length` ids at most, up to the end token of the model."""
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
    name: str, ours: PreTrainedModel, theirs: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Check:
    """Logits over `probe_ids` and greedy decoding of two models; nothing is raised here."""
    ids = probe_ids(ours, tokenizer)
    mask = torch.ones_like(ids)  # pad and end of text share an id, so transformers would warn
    logits = [model(ids, attention_mask=mask).logits.float() for model in (ours, theirs)]
    difference = (logits[0] - logits[1]).abs().max().item()
    start = story_start(tokenizer)
    same_text = greedy_ids(ours, start, ids.shape[1]) == greedy_ids(theirs, start, ids.shape[1])
    return Check(
        name=name,
        max_difference=difference,
        same_text=same_text,
        cache_error=cache_error(theirs, start),
        max_cache_error=max_cache_error(theirs.dtype),
    )


def require_equal(check: Check) -> Check:
    """`check` itself, where not a bit differs.

    Raises:
        ExportError: a logit or a token of the greedy story differs, or generation through the cache
            differs from the model's own forward pass.
    """
    if not check.cache_error <= check.max_cache_error:
        raise ExportError(
            f"{check.name}: generation with the cache differs from one forward pass by "
            f"{check.cache_error:.3g} of the largest logit (at most {check.max_cache_error}), so nothing was "
            "written; install another version of transformers, or report this"
        )
    if check.max_difference != 0.0 or not check.same_text:
        raise ExportError(f"{check}; both have to be equal, so nothing was written")
    return check


def require_same_ids(
    name: str,
    ours: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool = True,
) -> None:
    """Both tokenizers give each of `TEXTS` the same ids, and the ids the same text.

    Raises:
        ExportError: one text has other ids, or comes back as other text.
    """
    for text in TEXTS:
        expected, got = (
            tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
            for tokenizer in (ours, theirs)
        )
        if expected != got or ours.decode(expected) != theirs.decode(expected):
            raise ExportError(f"{name}: {text!r} is tokenized as {got}, not as {expected}")
