"""Generation requests and results: prompts to token ids, new token ids to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.errors import UserError
from tinystories_slm.generation.sentences import end_of_last_sentence
from tinystories_slm.model import TinyStoriesConfig

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


def prepare_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingParams,
) -> list[GenerationRequest]:
    """Tokenize each prompt and limit its new tokens to the rest of the model's context.

    Raises:
        UserError: a prompt fills the model's context or is not valid Unicode.
    """
    context = context_length(model)
    requests = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise UserError(
                f"the prompt {prompt[:40]!r} holds half a surrogate pair, which is no character; correct it"
            )
        ids = prompt_token_ids(model, tokenizer, prompt)
        room = sampling.max_new_tokens if context is None else context - len(ids)
        if room < 1:
            start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
            raise UserError(
                f"the prompt is {len(ids)} tokens long and the model's context is {context}; "
                f"shorten the prompt {start!r}"
            )
        requests.append(GenerationRequest(prompt, seed, ids, min(sampling.max_new_tokens, room)))
    return requests


def context_length(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens of prompt and completion; None if the model has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prompt_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of `prompt` with the model's start token; never empty.

    Models trained here see the end-of-text token before each document. For other models the tokenizer adds
    the start token. The exception is a tokenizer with one token for start and end, such as GPT-2's
    `<|endoftext|>`: the token separates documents, and the tokenizer does not add it.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    is_own_model = model.config.model_type == TinyStoriesConfig.model_type
    # verbose=False: `prepare_requests` raises an error where the tokenizer would warn of a long text.
    ids = tokenizer(prompt, add_special_tokens=not is_own_model, verbose=False).input_ids
    if prompt and len(ids) > 1 and ids[-1] == eos and not is_own_model:
        ids = ids[:-1]  # some tokenizers append the end token to every text
    separator = eos if is_own_model or bos == eos else None
    if separator is not None and ids[:1] != [separator]:
        ids = [separator, *ids]
    return ids or [bos if bos is not None else eos]


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text: the tokenizer's, then those of the model's `generation_config`."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    return list(dict.fromkeys([tokenizer.eos_token_id, *configured]))


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
