"""Every field of a request has an effect, or the request is rejected with its name."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.local_server import NAME

from tinystories_slm.data.chat_template import CHAT_TEMPLATE
from tinystories_slm.serving.api_error import ApiError
from tinystories_slm.serving.bodies import ChatBody, CompletionBody, parse_body
from tinystories_slm.serving.requests import ServedModel, chat_choices, completion_choices


@pytest.fixture
def served(model_with_tokenizer, tokenizer) -> ServedModel:
    return ServedModel(NAME, model_with_tokenizer, tokenizer, max_tokens=46, max_choices=8)


def choices_of(served: ServedModel, **fields) -> list:
    content = json.dumps({"model": NAME, "prompt": "A fox"} | fields).encode()
    return completion_choices(served, parse_body(content, CompletionBody), lambda _: None)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"prompt": None},
            "prompt",
            "prompt (None): must be a string, a list of strings, token ids or lists",
        ),
        ({"prompt": ["a", 1]}, "prompt", "must be a string, a list of strings, token ids or lists"),
        ({"prompt": []}, "prompt", "prompt ([]): must be"),
        ({"prompt": [True]}, "prompt", "prompt ([True]): must be"),
        ({"prompt": [-1]}, "prompt", "prompt (-1): token ids must be between 0 and 279; correct it"),
        ({"prompt": [[1], [280]]}, "prompt", "prompt (280): token ids must be between 0 and 279"),
        ({"prompt": "fox " * 60}, "prompt", "is 63 tokens long and the model's context is 48; shorten"),
        ({"prompt": [1] * 48}, "prompt", "is 48 tokens long and the model's context is 48; shorten"),
        ({"prompt": "\ud800"}, "prompt", "half a surrogate pair"),
        (
            {"max_tokens": 46},
            "max_tokens",
            "(46): the prompt has 3 tokens and the context is 48; use at most 45",
        ),
        ({"max_tokens": 47}, "max_tokens", "max_tokens (47): must be at most 46; use a smaller one"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens (0): must be greater than or equal to 1; correct it"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens (1.5): must be a valid integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens (True): must be a valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "must be at most 46"),
        ({"temperature": -1}, "temperature", "temperature (-1.0) must be 0 (greedy) or at least 0.001"),
        ({"temperature": float("nan")}, "temperature", "temperature (nan) must be 0 (greedy)"),
        ({"temperature": "1"}, "temperature", "temperature ('1'): must be a valid number"),
        ({"top_p": 0}, "top_p", "top_p (0.0) must be in (0, 1]"),
        ({"top_k": -1}, "top_k", "top_k (-1) must be 0 (off) or above"),
        ({"min_p": 2}, "min_p", "min_p (2.0) must be in [0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty (0.0) must be in"),
        ({"n": 9}, "n", "n (9): prompts times n are 9 and must be at most 8; send fewer"),
        ({"n": 3, "prompt": ["a"] * 3}, "n", "prompts times n are 9"),
        ({"seed": -1}, "seed", "seed (-1): must be greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "must be less than 9223372036854775808"),
        ({"stop": ["a"] * 5}, "stop", "must be a string or up to 4 strings, none of them empty"),
        ({"stop": ""}, "stop", "stop (''): must be a string or up to 4 strings"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"stop": 1}, "stop", "stop (1): must be a string"),
        ({"stop": 0}, "stop", "stop (0): must be a string"),
        ({"logprobs": 6}, "logprobs", "logprobs (6): must be less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "logprobs (True): must be a valid integer"),
        ({"echo": 1}, "echo", "echo (1): must be a valid boolean"),
        ({"stream": "yes"}, "stream", "must be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "has no effect without stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "is not supported; omit it"),
        ({"suffix": "The end"}, "suffix", "suffix ('The end'): is not supported; omit it"),
        ({"best_of": 3}, "best_of", "best_of (3): is not supported; omit it"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported; omit it"),
        ({"presence_penalty": 1}, "presence_penalty", "is not supported; omit it"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported; omit it"),
        ({"user": "me"}, "user", "user ('me'): is not supported; omit it"),
        ({"top_n": 1}, "top_n", "top_n (1): is not supported; omit it"),
        ({"model": "other"}, "model", "model ('other'): is not served; use 'tiny'"),
    ],
)
def test_a_field_with_an_invalid_value_is_named(served, fields, param, message):
    with pytest.raises(ApiError) as caught:
        choices_of(served, **fields)
    error = caught.value.body()["error"]
    assert message in error["message"] and "\n" not in error["message"] and len(error["message"]) < 250
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert caught.value.status == (404 if param == "model" else 400)


def test_values_without_an_effect_are_accepted(served):
    names = ("max_tokens", "temperature", "top_p", "n", "stop", "stream", "echo", "logprobs", "user")
    null = dict.fromkeys(names)
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": ""}
    [plain], [explicit] = choices_of(served, seed=1), choices_of(served, **null | neutral, seed=1)
    assert plain.sampling == explicit.sampling and plain.remaining == explicit.remaining == 45


def test_a_limit_that_is_not_requested_is_the_default_or_the_rest_of_the_context(served):
    assert [choice.remaining for choice in choices_of(served, prompt=["", "fox " * 5])] == [46, 40]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b"[" * 10**5, b'{"seed": ' + b"1" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object_is_one_line(content):
    with pytest.raises(ApiError, match=r"^the body [^\n]*$") as caught:
        parse_body(content, CompletionBody)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*CompletionBody.model_fields, *ChatBody.model_fields, "suffix", "best_of", "user", "logit_bias", "tools"]
)


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.booleans())
def test_any_json_gives_choices_or_an_error_of_the_request(served_once, fields, is_chat):
    body_type, build = (ChatBody, chat_choices) if is_chat else (CompletionBody, completion_choices)
    required = {"messages": [{"role": "user", "content": "A"}]} if is_chat else {"prompt": "A"}
    content = json.dumps({"model": NAME} | required | fields).encode()
    try:
        assert build(served_once, parse_body(content, body_type), lambda _: None)
    except ApiError as error:
        assert error.status in (400, 404) and json.dumps(error.body()).isascii()


@pytest.fixture(scope="module")
def served_once(model_with_tokenizer, tokenizer) -> Iterator[ServedModel]:
    tokenizer.chat_template = CHAT_TEMPLATE
    yield ServedModel(NAME, model_with_tokenizer, tokenizer, max_tokens=None, max_choices=8)
    tokenizer.chat_template = None
