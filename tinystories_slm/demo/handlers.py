"""Handlers of the page: a visitor generates, stops, or chooses a word."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from html import escape
from inspect import isgeneratorfunction
from typing import Any

import gradio as gr

from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.demo.live_stories import (
    StoryModel,
    StoryStart,
    branch_story,
    start_story,
    stream_stories,
)
from tinystories_slm.demo.story_html import render_story
from tinystories_slm.errors import UserError

_MAX_PROMPT_CHARS = 20_000
_MAX_SESSIONS = 1000


class StopSignals:
    """One event per session that generates or waits; the oldest of 1,000 is dropped."""

    def __init__(self) -> None:
        self._events: OrderedDict[str, threading.Event] = OrderedDict()
        self._lock = threading.Lock()

    def renew(self, session: str) -> threading.Event:
        """Return a new event of `session`, which is not set."""
        with self._lock:
            self._events.pop(session, None)
            event = self._events[session] = threading.Event()
            while len(self._events) > _MAX_SESSIONS:
                self._events.popitem(last=False)
            return event

    def find(self, session: str | None) -> threading.Event:
        """Return the event of `session`; a new one without a session, as of a call over HTTP."""
        if session is None:
            return threading.Event()
        with self._lock:
            event = self._events.get(session)
        return event or self.renew(session)

    def remove(self, session: str | None) -> None:
        """Forget the event of `session`."""
        with self._lock:
            self._events.pop(session, None)


class StoryHandlers:
    """Handlers of the page. They keep nothing of a visitor: a story and its tokens are in the browser.

    gradio passes a request and the data of an event before the values of the options.
    """

    def __init__(self, models: Sequence[StoryModel], args: DemoArgs) -> None:
        self.models, self.args = list(models), args
        self.stops = StopSignals()

    def begin(self, prompt: str, request: gr.Request, *options: float | str | None) -> list[Any]:
        """Check the inputs before the request waits for its turn."""
        _, sampling = self._read_options(*options)
        self._start(prompt, 0, sampling)
        self.stops.renew(request.session_hash)
        return [show_status("Waiting for a free place"), *set_busy(True)]

    def generate(self, prompt: str, request: gr.Request, *options: float | str | None) -> Iterator[list[Any]]:
        """Yield the status, the buttons and the growing story of each model."""
        seed, sampling = self._read_options(*options)
        starts = self._start(prompt, seed, sampling)
        event = self.stops.find(request.session_hash)
        yield from self._stream(self.models, starts, sampling, event)
        self.stops.remove(request.session_hash)

    def choose(
        self, index: int, request: gr.Request, event: gr.EventData, *options: float | str | None
    ) -> Iterator[list[Any]]:
        """Yield the status, the buttons and the story of model `index` as it goes on after a chosen word."""
        seed, sampling = self._read_options(*options)
        model, token_ids = self.models[index], event.token_ids[:_MAX_PROMPT_CHARS]
        chosen = [one for one in range(len(token_ids) - 1) if one in event.chosen]
        start = branch_story(model, token_ids, int(event.num_prompt_tokens), chosen, seed, sampling)
        yield from self._stream([model], [start], sampling, self.stops.renew(request.session_hash))
        self.stops.remove(request.session_hash)

    def stop(self, request: gr.Request) -> None:
        """Stop the stories of this session, also those that still wait."""
        self.stops.find(request.session_hash).set()

    def _start(self, prompt: str, seed: int, sampling: SamplingParams) -> list[StoryStart]:
        if len(prompt) > _MAX_PROMPT_CHARS:
            raise UserError(
                f"the prompt is {len(prompt):,} characters long; "
                f"the page takes {_MAX_PROMPT_CHARS:,}, shorten it"
            )
        return [start_story(model, prompt, seed, sampling) for model in self.models]

    def _stream(
        self,
        models: Sequence[StoryModel],
        starts: Sequence[StoryStart],
        sampling: SamplingParams,
        event: threading.Event,
    ) -> Iterator[list[Any]]:
        seed = starts[0].request.seed
        buttons = set_busy(True)
        for stories in stream_stories(models, starts, sampling, event.is_set):
            is_done = stories[0].ending is not None
            yield [
                show_status(f"Seed {seed}" if is_done else f"Writing with seed {seed}"),
                *(set_busy(False) if is_done else buttons),
                *map(render_story, stories),
            ]
            buttons = [gr.skip(), gr.skip()]

    def _read_options(
        self,
        max_new_tokens: float | None,
        temperature: float | None,
        top_k: float | None,
        top_p: float | None,
        seed: str,
    ) -> tuple[int, SamplingParams]:
        """Return seed and sampling parameters; an empty seed is drawn.

        Raises:
            UserError: a value is missing or out of range.
        """
        names = {"length": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        for name, value in names.items():
            if value is None:
                raise UserError(f"{name}: must be a number; enter one")
        if max_new_tokens > self.args.max_new_tokens:
            raise UserError(
                f"length ({max_new_tokens:.0f}) must be at most {self.args.max_new_tokens} on this page"
            )
        checked = GenerateArgs(
            model=self.models[0].name,
            max_new_tokens=int(max_new_tokens),
            temperature=temperature,
            top_k=int(top_k),
            top_p=top_p,
            seed=_read_seed(seed),
        )
        return checked.seed, checked.sampling()


def _read_seed(text: str) -> int:
    """Return the seed in `text`; a drawn one if it is empty.

    Raises:
        UserError: it is not a whole number.
    """
    if not text.strip():
        return secrets.randbelow(10_000)
    try:
        return int(text)
    except ValueError as error:
        raise UserError(
            f"seed ({text[:40]}): must be a whole number; correct it, or leave it empty"
        ) from error


def show_status(text: str) -> str:
    """Return the line below the buttons."""
    return f'<p class="status" role="status">{escape(text)}</p>'


def set_busy(is_busy: bool) -> list[Any]:
    """Return the state of the buttons Generate and Stop."""
    return [gr.Button(interactive=not is_busy), gr.Button(interactive=is_busy)]


def translate_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return `handler` with each `UserError` raised as the message that gradio shows."""
    shown = partial(gr.Error, title="Not possible", duration=20, print_exception=False)
    if isgeneratorfunction(handler):

        @wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except UserError as error:
                raise shown(str(error)) from error

        return stream

    @wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except UserError as error:
            raise shown(str(error)) from error

    return call
