"""Blind comparison on the page: two stories without names, a vote, and the estimate from all votes."""

import random
import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.demo.handlers import show_status, translate_errors
from tinystories_slm.demo.live_stories import StoryModel
from tinystories_slm.demo.story_html import render_text
from tinystories_slm.generation import generate_batch, prepare_requests
from tinystories_slm.report_card.arena import Vote, append_vote, bradley_terry, pair_key, read_votes
from tinystories_slm.report_card.card_prompts import read_card_prompts

# Those of report cards, so that both kinds of votes compare the same.
_SAMPLING = SamplingParams(max_new_tokens=512)
_VOTES = {"A is better": 1.0, "B is better": 0.0, "Tie": 0.5}
_HINT = "Two models write a story for the same prompt. Their names appear after your vote."


class ArenaHandlers:
    """Handlers of the comparison; the names behind two stories stay on the server until the vote."""

    def __init__(self, models: Sequence[StoryModel], votes: Path) -> None:
        self.models, self.votes = list(models), votes
        self._lock = threading.Lock()

    def write(self) -> list[Any]:
        """Return two stories, the buttons, and the hidden pair that `vote` takes."""
        pair = random.SystemRandom().sample(self.models, 2)
        prompt, seed = secrets.choice(read_card_prompts()), secrets.randbelow(2**31)
        texts = [_generate(model, prompt, seed) for model in pair]
        hidden = {"names": [model.name for model in pair], "texts": texts}
        shown = [render_text(text) for text in texts]
        return [hidden, show_status("Which story is better?"), *shown, *_set_buttons(True)]

    def vote(self, score: float, hidden: dict[str, Any] | None) -> list[Any]:
        """Keep the vote, and return the names and the estimate from all votes."""
        if hidden is None:  # a second click
            return [None, gr.skip(), gr.skip(), *_set_buttons(False)]
        names, texts = hidden["names"], hidden["texts"]
        with self._lock:
            append_vote(self.votes, Vote(pair_key(tuple(texts)), *names, score))
            votes = read_votes(self.votes)
        status = show_status(f"A: {names[0]}, B: {names[1]}")
        return [None, status, render_estimate(votes), *_set_buttons(False)]


def build_arena(models: Sequence[StoryModel], votes: Path, generation: Mapping[str, Any]) -> None:
    """Add the comparison of `models`; `generation` are the options of events that generate."""
    handlers = ArenaHandlers(models, votes)
    hidden = gr.State(None, time_to_live=3600)
    write = gr.Button("Write two stories", variant="primary", elem_id="write")
    status = gr.HTML(show_status(_HINT), elem_id="arena-status")
    with gr.Row(equal_height=False):
        shown = [_build_side(side) for side in "AB"]
    with gr.Row():
        buttons = [gr.Button(label, interactive=False, min_width=100) for label in _VOTES]
    estimate = gr.HTML(render_estimate(read_votes(votes)), elem_classes="estimate")

    private = {"api_visibility": "private"}
    write.click(
        translate_errors(handlers.write),
        None,
        [hidden, status, *shown, *buttons],
        show_progress_on=status,
        **generation,
        **private,
    )
    for button, score in zip(buttons, _VOTES.values(), strict=True):
        button.click(
            translate_errors(partial(handlers.vote, score)),
            hidden,
            [hidden, status, estimate, *buttons],
            show_progress="hidden",
            **private,
        )


def _build_side(side: str) -> gr.HTML:
    with gr.Column(min_width=320):
        gr.HTML(f'<h2 class="model-name">Story {side}</h2>')
        return gr.HTML(render_text(""))


def _generate(model: StoryModel, prompt: str, seed: int) -> str:
    requests = prepare_requests(model.model, model.tokenizer, [prompt], [seed], _SAMPLING)
    [result] = generate_batch(model.model, model.tokenizer, requests, _SAMPLING, batch_size=1)
    return result.text


def _set_buttons(is_active: bool) -> list[gr.Button]:
    return [gr.Button(interactive=is_active) for _ in _VOTES]


def render_estimate(votes: Sequence[Vote]) -> str:
    """Return a table of the shares that the models win; empty without votes."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{one['value']:.0%}</td>"
        f"<td>{one['low']:.0%} to {one['high']:.0%}</td><td>{one['count']}</td></tr>"
        for name, one in sorted(bradley_terry(votes).items(), key=lambda item: -item[1]["value"])
    )
    if not rows:
        return ""
    head = "<tr><th>model</th><th>wins</th><th>95% interval</th><th>votes</th></tr>"
    return f"<table>{head}{rows}</table>"
