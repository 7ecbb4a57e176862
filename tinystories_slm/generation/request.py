"""Generation requests and results: prompts to token ids, new token ids to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.errors import UserError
from tinystories_slm.generation.sentences import end_of_last_sentence
from tinystories_slm.text_boundaries import TextBoundaries, text_boundaries

FinishReason = Literal["stop", "length"]
"""stop: the model generated a stop token; length: the request reached its `max_new_tokens`."""


@dataclass(frozen=True)
class GenerationRequest:
    """A tokenized prompt with its seed and its limit of new tokens."""

    prompt: str
    seed: int
    token_ids: list[int]
    """Token ids of the prompt, with the start token that this model expects."""
    max_new_tokens: int
    """`SamplingParams.max_new_tokens`, or the rest of the context where that is smaller."""


@dataclass(frozen=True)
class GenerationResult:
    """The generated text of one request."""

    prompt: str
    seed: int
    """Seed of the request; model, prompt, sampling parameters and seed determine the text."""
    text: str
    """The prompt followed by the completion."""
    num_new_tokens: int
    """Number of sampled tokens, without the stop token; tokens that `finish_sentence` cut off count."""
    finish_reason: FinishReason


class PromptTooLongError(UserError):
    """A prompt leaves no place for a new token in the model's context."""


def prepare_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingParams,
) -> list[GenerationRequest]:
    """Tokenize each prompt and limit its new tokens to the rest of the model's context.

    Raises:
        PromptTooLongError: a prompt fills the model's context.
        UserError: a prompt is not valid Unicode.
    """
    boundaries = text_boundaries(model, tokenizer)
    requests = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise UserError(
                f"the prompt {prompt[:40]!r} holds half a surrogate pair, which is no character; correct it"
            )
        ids = _with_start(boundaries, tokenizer, prompt)
        requests.append(GenerationRequest(prompt, seed, ids, limit_new_tokens(model, prompt, ids, sampling)))
    return requests


def limit_new_tokens(
    model: PreTrainedModel, prompt: str, token_ids: Sequence[int], sampling: SamplingParams
) -> int:
    """Return `sampling.max_new_tokens`, or the rest of the context after `token_ids` where that is smaller.

    Raises:
        PromptTooLongError: the prompt fills the model's context.
    """
    context = context_length(model)
    room = sampling.max_new_tokens if context is None else context - len(token_ids)
    if room < 1:
        start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
        raise PromptTooLongError(
            f"the prompt is {len(token_ids)} tokens long and the model's context is {context}; "
            f"shorten the prompt {start!r}"
        )
    return min(sampling.max_new_tokens, room)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens of prompt and completion; None if the model has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prompt_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of `prompt` with the model's start token; never empty."""
    return _with_start(text_boundaries(model, tokenizer), tokenizer, prompt)


def _with_start(boundaries: TextBoundaries, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Encode `prompt` after the start token, which is not added to a prompt that begins with it."""
    # verbose=False: `prepare_requests` raises an error where the tokenizer would warn of a long text.
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    start = boundaries.start_ids
    if ids[: len(start)] != start:
        ids = [*start, *ids]
    return ids or boundaries.context_ids


def make_result(
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    new_ids: list[int],
    stop_ids: Sequence[int],
    *,
    finish_sentence: bool,
) -> GenerationResult:
    """Decode `new_ids` up to the first stop token.

    With `finish_sentence`, a text without a stop token is cut after its last complete sentence, if that
    sentence ends after the prompt.
    """
    stop_at = next((at for at, token in enumerate(new_ids) if token in stop_ids), None)
    new_ids = new_ids[:stop_at]
    text = tokenizer.decode(request.token_ids + new_ids, skip_special_tokens=True)
    if finish_sentence and stop_at is None:
        end = end_of_last_sentence(text)
        if end > len(tokenizer.decode(request.token_ids, skip_special_tokens=True)):
            text = text[:end]
    finish_reason: FinishReason = "length" if stop_at is None else "stop"
    return GenerationResult(request.prompt, request.seed, text, len(new_ids), finish_reason)
