"""The page: its parts, their looks, and the server that shows it."""

import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr

from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.demo.arena_tab import build_arena
from tinystories_slm.demo.handlers import StoryHandlers, set_busy, show_status, translate_errors
from tinystories_slm.demo.live_stories import StoryModel
from tinystories_slm.demo.story_html import render_text
from tinystories_slm.errors import UserError
from tinystories_slm.generation.prompts import default_prompt
from tinystories_slm.generation.request import context_length

# All that generates shares one limit of requests that run at the same time.
_GENERATION = {"concurrency_id": "generation", "show_progress": "minimal"}
_HINT = "The story appears here. Then point at a word, or tap it, for its probability and for other words."
_LEGEND = (
    '<p class="legend">Probability of a word under the model: <span>50% or more</span>'
    '<span class="level1">20%</span><span class="level2">5%</span><span class="level3">1%</span>'
    '<span class="level4">less</span> before temperature, top-k and top-p.</p>'
)


def build_page(models: Sequence[StoryModel], args: DemoArgs, report_cards: Sequence[Path]) -> gr.Blocks:
    """Return the page of `models`; `report_cards` are HTML files, each in a tab."""
    with gr.Blocks(title=f"Stories by {models[0].name}", analytics_enabled=False) as page:
        gr.HTML(_introduction(models))
        with gr.Tabs():
            with gr.Tab("Generate"):
                _build_stories(StoryHandlers(models, args), args)
            if len(models) > 1:
                with gr.Tab("Compare"):
                    build_arena(models, args.votes, _GENERATION)
            for number, path in enumerate(report_cards, start=1):
                title = "Report card" if number == 1 else f"Report card {number}"
                with gr.Tab(title):
                    gr.HTML(_frame(title, path.read_text(encoding="utf-8")), elem_classes="report-card")
    return page.queue(default_concurrency_limit=args.concurrency, max_size=args.queue_size)


def launch_page(page: gr.Blocks, args: DemoArgs) -> str:
    """Serve `page` from threads of this process and return its address.

    Raises:
        UserError: the port is in use, or the address is not one of this machine.
    """
    try:
        _, address, _ = page.launch(
            server_name=args.host,
            server_port=args.port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            theme=_theme(),
            css=_read("demo.css"),
            footer_links=[],
            # Nothing of a visitor is kept, and no other host is asked for anything.
            run_history=False,
            enable_monitoring=False,
            state_session_capacity=1000,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )
    except OSError as error:
        raise UserError(
            f"host, port ({args.host}, {args.port}): cannot be used ({' '.join(str(error).split())[:120]}); "
            "set --host or --port"
        ) from error
    return address


def _build_stories(handlers: StoryHandlers, args: DemoArgs) -> None:
    """Add the form, the stories and what connects them."""
    models, defaults = handlers.models, SamplingParams()
    prompt = gr.Textbox(
        value=default_prompt(models[0].tokenizer),
        label="How does the story begin?",
        lines=2,
        max_lines=8,
        elem_id="prompt",
    )
    with gr.Accordion("Sampling", open=False), gr.Row():
        options = [
            _number("Length", "new tokens", min(defaults.max_new_tokens, args.max_new_tokens), "length"),
            _number("Temperature", "0: most probable", defaults.temperature, "temperature"),
            _number("Top-k", "0: all tokens", defaults.top_k, "top_k"),
            _number("Top-p", "1: all tokens", defaults.top_p, "top_p"),
            gr.Textbox("", label="Seed", info="empty: random", elem_id="seed", min_width=130),
        ]
    with gr.Row():
        generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120, scale=3)
        stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=90)
    status = gr.HTML(show_status(_HINT), elem_id="status")
    with gr.Row(equal_height=False):
        stories = [_build_story(model, is_named=len(models) > 1) for model in models]
    gr.HTML(_LEGEND)

    controls = [status, generate, stop]
    private = {"api_visibility": "private"}
    begun = gr.on(
        [generate.click, prompt.submit],
        translate_errors(handlers.begin),
        [prompt, *options],
        controls,
        concurrency_limit=None,  # but in the queue: without it, gradio shows no message of an error
        show_progress="hidden",
        **private,
    )
    written = begun.success(
        translate_errors(handlers.generate),
        [prompt, *options],
        [*controls, *stories],
        api_name="generate",
        show_progress_on=status,
        **_GENERATION,
    )
    written.failure(lambda: set_busy(False), None, [generate, stop], queue=False, **private)
    for index, story in enumerate(stories):
        chosen = story.choose(
            translate_errors(handlers.choose),
            [gr.State(index), *options],
            [*controls, story],
            show_progress_on=status,
            **_GENERATION,
            **private,
        )
        chosen.failure(lambda: set_busy(False), None, [generate, stop], queue=False, **private)
    stop.click(handlers.stop, None, None, queue=False, show_progress="hidden", **private)


def _build_story(model: StoryModel, *, is_named: bool) -> gr.HTML:
    with gr.Column(min_width=320):
        if is_named:
            gr.HTML(f'<h2 class="model-name">{escape(model.name)}</h2>')
        return gr.HTML(render_text(""), js_on_load=_read("story.js"), elem_classes="story-of-model")


def _number(label: str, info: str, value: float | None, name: str) -> gr.Number:
    return gr.Number(value, label=label, info=info, elem_id=name, min_width=130)


def _introduction(models: Sequence[StoryModel]) -> str:
    described = ", ".join(
        f"{escape(one.name)} ({one.model.num_parameters() / 1e6:,.1f} million parameters, "
        f"context {context_length(one.model) or 'unlimited'})"
        for one in models
    )
    return f'<header class="intro"><h1>A small story generator</h1><p>{described}</p></header>'


def _frame(title: str, html: str) -> str:
    """Return a frame that shows a page of its own, without scripts."""
    return f'<iframe title="{escape(title)}" sandbox srcdoc="{escape(html)}"></iframe>'


def _theme() -> gr.themes.Base:
    """Return the theme with fonts of the system: others would be loaded from another host."""
    return gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        body_background_fill="#f6f5f1",
        body_background_fill_dark="#14161a",
        button_primary_background_fill="#2563c9",
        button_primary_background_fill_dark="#2563c9",
    )


def _read(name: str) -> str:
    return files("tinystories_slm.demo").joinpath(name).read_text(encoding="utf-8")
