"""From the body of a request to the choices that the scheduler generates."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.errors import UserError
from tinystories_slm.generation.detokenizer import IncrementalDetokenizer
from tinystories_slm.generation.request import (
    GenerationRequest,
    PromptTooLongError,
    context_length,
    limit_new_tokens,
    prepare_requests,
)
from tinystories_slm.generation.sampling import request_rng
from tinystories_slm.serving.api_error import ApiError, field_error
from tinystories_slm.serving.bodies import ChatBody, CompletionBody, RequestBody
from tinystories_slm.serving.choice import Choice, Piece
from tinystories_slm.serving.stop_strings import StopStrings
from tinystories_slm.text_boundaries import stop_token_ids


@dataclass(frozen=True)
class ServedModel:
    """The model that is served, and the limits of a request."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None
    """New tokens of a choice, at most; None for the rest of the context."""
    max_choices: int
    """Choices of a request, at most: prompts times `n`."""


def completion_choices(
    served: ServedModel, body: CompletionBody, emit: Callable[[Piece | Exception], None]
) -> list[Choice]:
    """Return the choices of a completion request: `n` for each prompt, with the seeds seed, seed + 1, ...

    Raises:
        ApiError: a field has an invalid value, or a prompt and its new tokens exceed the context.
    """
    _check_shared_fields(served, body, len(body.prompt))
    if isinstance(body.prompt[0], str):
        requests = _prepare(served, body, body.prompt, "prompt")
    else:
        requests = [_request_of_ids(served, body, ids) for ids in body.prompt]
    return _build_choices(served, body, requests, emit)


def chat_choices(
    served: ServedModel, body: ChatBody, emit: Callable[[Piece | Exception], None]
) -> list[Choice]:
    """Return the `n` choices of a chat request, whose prompt the tokenizer's chat template writes.

    Raises:
        ApiError: as for a completion, or the template rejects the messages.
    """
    _check_shared_fields(served, body, 1)
    messages = [message.model_dump() for message in body.messages]
    try:
        prompt = served.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise field_error("messages", f"messages: {error}; correct them") from error
    return _build_choices(served, body, _prepare(served, body, [prompt], "messages"), emit)


def _check_shared_fields(served: ServedModel, body: RequestBody, num_prompts: int) -> None:
    if body.model != served.name:
        raise ApiError(
            404,
            f"model ({body.model[:60]!r}): is not served; use {served.name!r}",
            param="model",
            code="model_not_found",
        )
    num_choices = num_prompts * (body.n or 1)
    if num_choices > served.max_choices:
        raise field_error(
            "n",
            f"n ({body.n or 1}): prompts times n are {num_choices} and must be at most {served.max_choices}; "
            "send fewer",
        )
    name, limit = body.token_limit
    if limit is not None and served.max_tokens is not None and limit > served.max_tokens:
        raise field_error(name, f"{name} ({limit}): must be at most {served.max_tokens}; use a smaller one")


def _prepare(
    served: ServedModel, body: RequestBody, prompts: list[str], param: str
) -> list[GenerationRequest]:
    """Tokenize each prompt, with the seed of its first choice."""
    sampling = _with_token_limit(served, body)
    seeds = [_first_seed(body) for _ in prompts]
    try:
        requests = prepare_requests(served.model, served.tokenizer, prompts, seeds, sampling)
    except UserError as error:
        raise _prompt_error(param, error) from error
    for request in requests:
        _check_context(served, body, len(request.token_ids), request.max_new_tokens)
    return requests


def _request_of_ids(served: ServedModel, body: CompletionBody, ids: list[int]) -> GenerationRequest:
    """Return the request of a prompt of token ids, which is read as it is, without a start token."""
    vocab_size = served.model.config.vocab_size
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise field_error(
            "prompt", f"prompt ({wrong[0]}): token ids must be between 0 and {vocab_size - 1}; correct it"
        )
    sampling = _with_token_limit(served, body)
    try:
        limit = limit_new_tokens(served.model, "token ids", ids, sampling)
    except UserError as error:
        raise _prompt_error("prompt", error) from error
    _check_context(served, body, len(ids), limit)
    return GenerationRequest("", _first_seed(body), ids, limit)


def _prompt_error(param: str, error: UserError) -> ApiError:
    code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
    return field_error(param, f"{param}: {error}", code=code)


def _with_token_limit(served: ServedModel, body: RequestBody) -> SamplingParams:
    sampling = body.sampling()
    _, limit = body.token_limit
    if limit is None:
        limit = min(sampling.max_new_tokens, served.max_tokens or sampling.max_new_tokens)
    return replace(sampling, max_new_tokens=limit)


def _check_context(served: ServedModel, body: RequestBody, num_prompt_tokens: int, limit: int) -> None:
    """Reject a number of new tokens that was requested and exceeds the context."""
    name, requested = body.token_limit
    if requested is not None and limit < requested:
        context = context_length(served.model)
        raise field_error(
            name,
            f"{name} ({requested}): the prompt has {num_prompt_tokens} tokens and the context is {context}; "
            f"use at most {limit}",
            code="context_length_exceeded",
        )


def _first_seed(body: RequestBody) -> int:
    return secrets.randbelow(2**31) if body.seed is None else body.seed


def _build_choices(
    served: ServedModel,
    body: RequestBody,
    requests: list[GenerationRequest],
    emit: Callable[[Piece | Exception], None],
) -> list[Choice]:
    sampling = body.sampling()
    stop_ids = stop_token_ids(served.model, served.tokenizer)
    num_top_logprobs, echoes = getattr(body, "logprobs", None), bool(getattr(body, "echo", None))
    choices: list[Choice] = []
    for request in requests:
        texts = _prompt_texts(served.tokenizer, request.token_ids) if echoes else []
        scores_prompt = echoes and num_top_logprobs is not None
        choices += [
            Choice(
                len(choices) + number,
                request.token_ids,
                request.max_new_tokens,
                request_rng(request.seed + number),
                sampling,
                num_top_logprobs,
                detokenizer=IncrementalDetokenizer(served.tokenizer, request.token_ids),
                stops=StopStrings(body.stop or []),
                stop_ids=stop_ids,
                emit=emit,
                echo="".join(texts),
                prompt_offsets=list(accumulate(map(len, texts), initial=0))[:-2] if scores_prompt else None,
            )
            for number in range(body.n or 1)
        ]
    return choices


def _prompt_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token, without special tokens, and the rest of an incomplete character."""
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    texts = [detokenizer.add(token) for token in ids]
    return [*texts, detokenizer.flush()]
