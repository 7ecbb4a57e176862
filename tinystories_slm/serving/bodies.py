"""The JSON bodies of requests: every field has an effect, or the request is rejected."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.errors import UserError
from tinystories_slm.serving.api_error import ApiError, field_error

_DEFAULTS = SamplingParams()
_MAX_STOPS = 4
_MAX_TOP_LOGPROBS = 5

_NO_PENALTY = {"frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {})}
_NEUTRAL_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "CompletionBody": {**_NO_PENALTY, "suffix": (None, ""), "best_of": (None, 1), "user": (None,)},
    "ChatBody": {
        **_NO_PENALTY,
        **{"logprobs": (None, False), "top_logprobs": (None, 0), "user": (None,), "tools": (None, [])},
        **{"response_format": (None, {"type": "text"})},
    },
}
"""Fields of OpenAI's interface without support, and the values that have no effect, which clients send."""

Body = TypeVar("Body", bound="RequestBody")


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class RequestBody(BaseModel):
    """Fields that completions and chat completions share; the defaults are those of `scripts/generate.py`."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: Any) -> list[str]:
        stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
        is_list = isinstance(stops, list) and all(isinstance(one, str) and one for one in stops)
        if not is_list or len(stops) > _MAX_STOPS:
            raise ValueError(f"must be a string or up to {_MAX_STOPS} strings, none of them empty")
        return stops

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters, without the limit of tokens.

        Raises:
            ApiError: a value is out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        try:
            return SamplingParams(**given)
        except UserError as error:
            raise field_error(str(error).split()[0], str(error)) from error

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the new tokens."""
        return "max_tokens", self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(RequestBody):
    """Body of `/v1/completions`."""

    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> list[str] | list[list[int]]:
        """Return a list of prompts, texts or token ids."""
        prompts = [prompt] if isinstance(prompt, str) or _is_list_of(prompt, int) else prompt
        if not (_is_list_of(prompts, str) or _is_list_of_ids(prompts)):
            raise ValueError("must be a string, a list of strings, token ids or lists of token ids")
        return prompts


class ChatMessage(BaseModel):
    """A message of a conversation, as the chat template reads it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: str
    content: str


class ChatBody(RequestBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return super().token_limit
        if self.max_tokens is not None:
            raise field_error(
                "max_tokens", f"max_tokens ({self.max_tokens}): is the older name; omit one of them"
            )
        return "max_completion_tokens", self.max_completion_tokens


def _is_list_of(value: Any, kind: type) -> bool:
    """Whether `value` is a list with at least one item, all of type `kind`; True and False are no numbers."""
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_list_of(item, int) for item in value)


def parse_body(content: bytes, body_type: type[Body]) -> Body:
    """Parse the JSON of a request.

    Raises:
        ApiError: it is not JSON, or a field is missing, unknown, not supported or has an invalid value.
    """
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        reason = " ".join(str(error).split())[:100]
        raise ApiError(400, f"the body is not JSON ({reason}); send a JSON object") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body ({_shorten(fields)}) must be a JSON object; send one")
    supported = _remove_neutral_values(fields, _NEUTRAL_VALUES[body_type.__name__])
    try:
        body = body_type.model_validate(supported)
    except ValidationError as error:
        raise _validation_error(error) from error
    if body.stream_options is not None and not body.stream:
        raise field_error(
            "stream_options", "stream_options: has no effect without stream; set stream to true"
        )
    return body


def _remove_neutral_values(fields: Mapping[str, Any], neutral: Mapping[str, tuple]) -> dict[str, Any]:
    for name, values in neutral.items():
        if name in fields and not any(fields[name] == value for value in values):
            raise field_error(name, f"{name} ({_shorten(fields[name])}): is not supported; omit it")
    return {name: value for name, value in fields.items() if name not in neutral}


def _validation_error(error: ValidationError) -> ApiError:
    """Return the first problem that pydantic found."""
    problem = error.errors(include_url=False)[0]
    param = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return field_error(param, f"{param}: is missing; set it")
    if problem["type"] == "extra_forbidden":
        return field_error(param, f"{param} ({_shorten(problem['input'])}): is not supported; omit it")
    reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    reason = reason if reason.startswith("must") else f"must {reason}"
    return field_error(param, f"{param} ({_shorten(problem['input'])}): {reason}; correct it")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
