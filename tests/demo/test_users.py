"""Many users of one page: own stories, limits, and what a call over HTTP gives."""

import runpy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from demo_client import call, story_text

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.demo.live_stories import LiveStory, start_story
from tinystories_slm.demo.story_html import render_story
from tinystories_slm.generation import generate_texts

NUM_USERS = 50


def test_fifty_users_at_once_each_get_their_own_story(serve, tales):
    pytest.importorskip("gradio", reason="needs the extra demo")
    address = serve([tales], concurrency=4, queue_size=NUM_USERS)
    prompts = [f"One day, {name}" for name in ("Mia", "Ben", "a fox", "Lily", "Max")] * (NUM_USERS // 5)
    limits = [5 + number % 7 for number in range(NUM_USERS)]

    def visit(number: int) -> tuple[str, object]:
        return call(address, prompts[number], limits[number], 0.8, 50, 0.95, str(number))

    with ThreadPoolExecutor(NUM_USERS) as users:
        answers = list(users.map(visit, range(NUM_USERS)))
    for number, (event, data) in enumerate(answers):
        assert event == "complete", data
        [expected] = generate_texts(
            tales.model, tales.tokenizer, [prompts[number]], seed=number, max_new_tokens=limits[number]
        )
        assert story_text(data[-1], tales.tokenizer) == expected
        assert f"Seed {number}<" in data[0]
    threads = [thread.name for thread in threading.enumerate() if "_generate" in thread.name]
    assert threads == []  # no generation is left behind


def test_request_beyond_the_queue_is_rejected(serve, tales, monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra demo")
    from tinystories_slm.demo import handlers

    release = threading.Event()
    stream_stories = handlers.stream_stories

    def wait_and_stream(*args):
        assert release.wait(120)
        yield from stream_stories(*args)

    monkeypatch.setattr(handlers, "stream_stories", wait_and_stream)
    address = serve([tales], concurrency=1, queue_size=2)
    options = ("Once", 5, 0.8, 50, 0.95, "1")
    with ThreadPoolExecutor(8) as users:
        pending = [users.submit(call, address, *options) for _ in range(8)]
        deadline_s = time.monotonic() + 60
        while sum(one.done() for one in pending) < 5 and time.monotonic() < deadline_s:
            time.sleep(0.05)  # one runs, two wait
        release.set()
        answers = [one.result() for one in pending]
    rejected = [str(data) for event, data in answers if event != "complete"]
    assert len(rejected) == 5 and all("Queue is full" in text for text in rejected)


def test_error_over_http_is_the_message(serve, tales):
    address = serve([tales])
    event, data = call(address, "Once", 5, 0.0005, 50, 0.95, "1")
    assert event == "error"
    assert "temperature (0.0005) must be 0 (greedy) or at least 0.001; try 0.8" in str(data)


@pytest.mark.slow
def test_benchmark_measures_users_of_the_page(tales, tales_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "demo.py"))
    found = benchmark["measure"](str(tales_folder), 3, 2)
    assert found["errors"] == [] and found["wrong_stories"] == 0
    assert len(found["story_s"]["values"]) == 3 and found["peak_bytes"] >= found["idle_bytes"] > 1e8
    assert 0 < found["first_word_s"]["median"] <= found["story_s"]["max"]
    text = benchmark["prompt_of"](0) + " in a hut."  # not what the model writes
    start = start_story(tales, text, 1, SamplingParams(max_new_tokens=1))
    outcome = {"html": render_story(LiveStory(text, "stop", start, start.request.token_ids))}
    assert benchmark["count_wrong_stories"](str(tales_folder), [outcome]) == 1
