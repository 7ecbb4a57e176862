"""Stories that grow on the page: one or several models side by side, stopped at any time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.demo.token_alternatives import Word, story_words
from tinystories_slm.errors import UserError
from tinystories_slm.generation import TextStream, prepare_requests
from tinystories_slm.generation.request import FinishReason, GenerationRequest, context_length
from tinystories_slm.text_boundaries import suppressed_token_ids

# More updates are not seen as motion, and each one is a message to the browser.
_UPDATE_INTERVAL_S = 0.05


@dataclass(frozen=True)
class StoryModel:
    """A loaded model and the name that the page shows."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class StoryStart:
    """Start of a story: the prompt, and words that were chosen."""

    request: GenerationRequest
    num_prompt_tokens: int
    chosen: tuple[int, ...] = ()
    """Indices of the tokens that the user has chosen."""


@dataclass(frozen=True)
class LiveStory:
    """A story as far as it is generated."""

    text: str
    ending: FinishReason | Literal["stopped"] | None = None
    """Why it ended; None while it grows, and the following fields are then empty."""
    start: StoryStart | None = None
    token_ids: list[int] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)


def start_story(model: StoryModel, prompt: str, seed: int, sampling: SamplingParams) -> StoryStart:
    """Return the start of a story with the text `prompt`.

    Raises:
        UserError: the prompt fills the model's context.
    """
    [request] = prepare_requests(model.model, model.tokenizer, [prompt], [seed], sampling)
    return StoryStart(request, len(request.token_ids))


def branch_story(
    model: StoryModel,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    chosen: Sequence[int],
    seed: int,
    sampling: SamplingParams,
) -> StoryStart:
    """Return the start of a story that goes on after `token_ids`, of which the last was chosen.

    Raises:
        UserError: an id is not in the vocabulary, or the ids fill the model's context.
    """
    vocab_size, context = model.model.get_input_embeddings().num_embeddings, context_length(model.model)
    if not token_ids or not all(type(one) is int and 0 <= one < vocab_size for one in token_ids):
        raise UserError("the chosen word does not belong to a story of this model; generate the story again")
    room = sampling.max_new_tokens if context is None else context - len(token_ids)
    if room < 1:
        raise UserError(
            f"the story up to this word fills the model's context of {context} tokens; choose an earlier word"
        )
    text = model.tokenizer.decode(list(token_ids), skip_special_tokens=True)
    request = GenerationRequest(text, seed, list(token_ids), min(sampling.max_new_tokens, room))
    return StoryStart(request, num_prompt_tokens, (*chosen, len(token_ids) - 1))


def stream_stories(
    models: Sequence[StoryModel],
    starts: Sequence[StoryStart],
    sampling: SamplingParams,
    is_stopped: Callable[[], bool],
) -> Iterator[list[LiveStory]]:
    """Yield the stories of all models while they grow, and at the end with their words.

    If `is_stopped` returns true or the consumer closes the iterator, generation stops within one token.
    """
    streams = [
        TextStream(one.model, one.tokenizer, start.request, sampling)
        for one, start in zip(models, starts, strict=True)
    ]
    texts = [""] * len(streams)
    growing = list(range(len(streams)))
    with ExitStack() as stack:
        pieces = [stack.enter_context(closing(iter(stream))) for stream in streams]
        next_update_s = time.monotonic()
        while growing and not is_stopped():
            for index in list(growing):
                piece = next(pieces[index], None)
                if piece is None:
                    growing.remove(index)
                else:
                    texts[index] += piece
            if growing and time.monotonic() >= next_update_s:
                yield [LiveStory(text) for text in texts]
                next_update_s = time.monotonic() + _UPDATE_INTERVAL_S
    yield [
        _finished(model, start, stream, is_stopped=index in growing)
        for index, (model, start, stream) in enumerate(zip(models, starts, streams, strict=True))
    ]


def _finished(model: StoryModel, start: StoryStart, stream: TextStream, *, is_stopped: bool) -> LiveStory:
    if stream.result is None:  # stopped before the first token
        return LiveStory("", "stopped", start)
    token_ids = start.request.token_ids + stream.new_ids
    words = story_words(
        model.model,
        model.tokenizer,
        token_ids,
        suppressed_ids=suppressed_token_ids(model.model, model.tokenizer),
    )
    ending = "stopped" if is_stopped else stream.result.finish_reason
    return LiveStory(stream.result.text, ending, start, token_ids, words)
