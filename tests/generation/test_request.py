import pytest

from tinystories_slm.errors import UserError
from tinystories_slm.generation import SamplingParams, prepare_requests


def test_max_new_tokens_is_limited_to_the_rest_of_the_context(model_with_tokenizer, tokenizer):
    sampling = SamplingParams(max_new_tokens=45)
    [short, long] = prepare_requests(model_with_tokenizer, tokenizer, ["", "fox " * 5], [0, 1], sampling)
    assert short.max_new_tokens == 45
    assert long.max_new_tokens == 48 - len(long.token_ids) < 45


def test_prompt_that_fills_the_context_is_rejected(model_with_tokenizer, tokenizer):
    message = (
        r"prompt is \d+ tokens long and the model's context is 48; shorten the prompt 'fox fox .*\.\.\.'"
    )
    with pytest.raises(UserError, match=message):
        prepare_requests(model_with_tokenizer, tokenizer, ["fox " * 60], [0], SamplingParams())
