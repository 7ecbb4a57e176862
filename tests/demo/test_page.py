"""The page in headless Chromium, as a visitor uses it."""

import copy
import dataclasses
import json
import re
import time

import pytest
from conftest import brightness
from demo_client import CONTEXT

from tinystories_slm.commands.generate import generate
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.demo.token_alternatives import story_words
from tinystories_slm.generation import SamplingParams, TextStream, generate_texts
from tinystories_slm.generation.request import GenerationRequest
from tinystories_slm.report_card.arena import read_votes

pytestmark = pytest.mark.browser
OPTIONS = {"max_new_tokens": 60, "temperature": 0.7, "top_k": 20, "top_p": 0.9}


class Visitor:
    """A browser tab with the page, its errors and the hosts that it requests from."""

    def __init__(self, browser, address: str, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500
        )
        self.errors, self.urls = [], []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.goto(address)
        self.page.locator("#generate").wait_for()

    def set_options(self, seed: int | str = "", **options: float | str) -> None:
        names = {"max_new_tokens": "length"}
        if not self.page.locator("#seed textarea, #seed input").is_visible():
            self.page.get_by_text("Sampling").first.click()
        for name, value in {**options, "seed": seed}.items():
            self.page.locator(f"#{names.get(name, name)} :is(input, textarea)").fill(str(value))

    def generate(self, prompt: str | None = None) -> None:
        if prompt is not None:
            self.page.locator("#prompt textarea").fill(prompt)
        self.page.locator("#generate").click()

    def story(self, index: int = 0):
        return self.page.locator(".story-of-model article").nth(index)

    def finished(self, index: int = 0) -> str:
        """Wait for the end of a story; return its text without the marks."""
        self.page.locator(".story-of-model article[data-story]").nth(index).wait_for()
        self.page.locator("#stop:disabled").wait_for()
        text = (
            self.story(index)
            .locator(".text")
            .evaluate(
                "p => [...p.childNodes].filter(node => !node.classList?.contains('mark'))"
                ".map(node => node.textContent).join('')"
            )
        )
        return text

    def data(self, index: int = 0) -> dict:
        return json.loads(self.story(index).get_attribute("data-story"))


def slow_down(model, seconds: float) -> list[int]:
    """Make each forward pass take `seconds` more; return the list of their numbers."""
    calls = []

    def wait(*_):
        calls.append(len(calls))
        time.sleep(seconds)

    model.register_forward_pre_hook(wait)
    return calls


@pytest.fixture
def slow(tales):
    """`tales` with 40 ms per token, and the list of its forward passes."""
    model = copy.deepcopy(tales.model)
    calls = slow_down(model, 0.04)
    return dataclasses.replace(tales, model=model), calls


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["desk", "phone"])
def test_a_visitor_types_and_sees_the_story_of_the_generate_command(
    browser, serve, contacted, tales, tales_folder, width, scheme, capsys
):
    visitor = Visitor(browser, serve([tales]), width, scheme)
    visitor.set_options(seed=7, **OPTIONS)
    visitor.generate("One day, Mia")
    text = visitor.finished()
    [result] = generate(GenerateArgs(model=str(tales_folder), prompt="One day, Mia", seed=7, **OPTIONS))
    assert text == result.text and text.startswith("One day, Mia")
    assert visitor.page.locator("#status").inner_text() == "Seed 7"
    assert visitor.story().locator("footer").inner_text() == (
        "60 tokens, reached the length, or the end of the model's context"
    )
    assert visitor.page.evaluate("document.documentElement.scrollWidth") == width
    colors = visitor.page.evaluate(
        "['color', 'backgroundColor'].map(name => getComputedStyle(document.querySelector('.story'))[name])"
    )
    text_color, background = map(brightness, colors)
    assert (text_color > background) == (scheme == "dark") and abs(text_color - background) > 400
    if scheme == "dark":
        visitor.page.locator(".word").nth(9).tap()
        box = visitor.page.locator(".alternatives:visible").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert visitor.errors == []
    assert {url.split("/")[2].split(":")[0] for url in visitor.urls if "://" in url} == {"127.0.0.1"}
    assert contacted <= {"127.0.0.1", "0.0.0.0", "::1", "localhost"}


def test_story_grows_and_stops(browser, serve, slow):
    model, _ = slow
    visitor = Visitor(browser, serve([model]))
    visitor.set_options(seed=3, max_new_tokens=150)
    visitor.generate()
    visitor.page.locator(".story-of-model article[aria-busy=true]").wait_for()
    lengths = []
    while len(set(lengths)) < 4:
        assert visitor.story().get_attribute("aria-busy") == "true"
        lengths.append(len(visitor.story().inner_text()))
        visitor.page.wait_for_timeout(30)
    assert lengths == sorted(lengths)
    visitor.page.locator("#stop").click()
    text = visitor.finished()
    assert visitor.story().locator("footer").inner_text().endswith("tokens, stopped")
    full = generate_texts(model.model, model.tokenizer, ["Once upon a time"], seed=3, max_new_tokens=150)[0]
    assert full.startswith(text) and 20 < len(text) < len(full)
    visitor.set_options(seed=4, max_new_tokens=5)
    visitor.generate()  # the next story is not stopped
    visitor.page.get_by_text("Seed 4").wait_for()
    assert visitor.story().locator("footer").inner_text().startswith("5 tokens, reached the length")


def test_waiting_story_stops_before_it_starts(browser, serve, slow):
    model, _ = slow
    address = serve([model], concurrency=1)
    first, second = Visitor(browser, address), Visitor(browser, address)
    for visitor in (first, second):
        visitor.set_options(max_new_tokens=60)
        visitor.generate()
    second.page.locator("#stop:enabled").click()
    first.page.locator("#stop").click()
    second.page.locator("#stop:disabled").wait_for()
    assert second.story().inner_text().strip() == "0 tokens, stopped"


def test_closing_the_tab_ends_the_story(browser, serve, slow):
    model, calls = slow
    visitor = Visitor(browser, serve([model]))
    visitor.set_options(max_new_tokens=150)
    visitor.generate()
    visitor.page.locator("article[aria-busy]").wait_for()
    visitor.page.close()
    deadline = time.monotonic() + 30
    before = -1
    while before != len(calls):
        assert time.monotonic() < deadline
        before = len(calls)
        time.sleep(0.5)
    assert len(calls) < 140


def test_words_show_probabilities_and_another_word_continues_the_story(browser, serve, tales):
    visitor = Visitor(browser, serve([tales]))
    visitor.set_options(seed=7, **OPTIONS)
    visitor.generate()
    first = visitor.finished()
    data = visitor.data()
    words = story_words(tales.model, tales.tokenizer, data["ids"])
    expected = [word.probability for word in words]
    assert [word["p"] for word in data["words"]] == pytest.approx(expected, rel=1e-3)
    at = next(
        index
        for index, word in enumerate(words)
        if index > 8 and len(word.tokens) == 1 and word.text.strip().isalpha()
    )
    [token] = words[at].tokens

    word = visitor.page.locator(".word").nth(at)
    word.hover()
    tip = visitor.page.locator(".alternatives:visible")
    shown = [line.split("\n") for line in tip.locator("button").all_inner_texts()]
    assert [line[0] for line in shown][:5] == [one.text.strip() for one in token.alternatives]
    for line, one in zip(shown, token.alternatives, strict=False):
        if not line[1].startswith("<"):
            assert float(line[1].rstrip("%")) == pytest.approx(100 * one.probability, abs=0.5)
    visitor.page.mouse.move(2, 2)
    tip.wait_for(state="hidden")

    other = next(one for one in token.alternatives if one.token_id != token.token.token_id)
    word.click()
    tip.locator("button:enabled", has_text=re.compile(re.escape(other.text.strip()))).first.click()
    visitor.page.locator(".word.chosen").wait_for()
    second = visitor.finished()
    ids = [*data["ids"][: token.index], other.token_id]
    sampling = SamplingParams(**OPTIONS)
    request = GenerationRequest("", 7, ids, min(60, CONTEXT - len(ids)))
    assert second == "".join(TextStream(tales.model, tales.tokenizer, request, sampling))
    assert second != first
    assert visitor.page.locator(".word.chosen").inner_text() in second
    assert visitor.data()["chosen"] == [token.index] and visitor.data()["ids"][: len(ids)] == ids
    assert visitor.errors == []


def test_keyboard_reaches_words_and_alternatives(browser, serve, tales):
    visitor = Visitor(browser, serve([tales]))
    visitor.set_options(seed=7, **OPTIONS)
    visitor.generate()
    visitor.finished()
    page = visitor.page
    page.locator(".word").first.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.word") == "6"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('.alternatives') !== null")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.word") == "6"
    assert page.locator(".alternatives:visible").count() == 0


BAD_INPUT = [
    ({"temperature": -1}, None, "temperature (-1) must be 0 (greedy) or at least 0.001; try 0.8"),
    ({"temperature": ""}, None, "temperature: must be a number; enter one"),
    ({"top_p": 3}, None, "top_p (3) must be in (0, 1]; try 0.95, or 1 to switch it off"),
    ({"max_new_tokens": 900}, None, "length (900) must be at most 512 on this page"),
    ({"seed": -4}, None, "seed (-4) must be between 0 and 9223372036854775807"),
    ({"seed": "seven"}, None, "seed (seven): must be a whole number; correct it, or leave it empty"),
    ({}, "fox " * 200, f"and the model's context is {CONTEXT}; shorten the prompt"),
    ({}, "fox " * 6000, "the prompt is 24,000 characters long; the page takes 20,000, shorten it"),
]


def test_bad_input_is_answered_in_plain_words(browser, serve, tales):
    visitor = Visitor(browser, serve([tales]))
    defaults = OPTIONS | {"seed": 1}
    for options, prompt, message in BAD_INPUT:
        visitor.set_options(**(defaults | options))
        visitor.generate(prompt or "Once")
        visitor.page.get_by_text(message).wait_for()
    assert "Traceback" not in visitor.page.content()
    visitor.set_options(**defaults)
    visitor.generate("Once")  # the page still works
    text = visitor.finished()
    assert text == generate_texts(tales.model, tales.tokenizer, ["Once"], seed=1, **OPTIONS)[0]


def test_models_stand_side_by_side_and_are_compared_blind(browser, serve, tales, other, tmp_path):
    votes = tmp_path / "card.votes.jsonl"
    visitor = Visitor(browser, serve([tales, other], votes=votes))
    visitor.set_options(seed=7, **OPTIONS)
    visitor.generate()
    for index, model in enumerate((tales, other)):
        expected = generate_texts(model.model, model.tokenizer, ["Once upon a time"], seed=7, **OPTIONS)
        assert [visitor.finished(index)] == expected
    boxes = [visitor.story(index).bounding_box() for index in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]

    page = visitor.page
    page.get_by_role("tab", name="Compare").click()
    for number, button in enumerate(("A is better", "Tie"), start=1):
        page.locator("#write").click()
        page.locator(f"button:enabled:has-text('{button}')").wait_for()
        panel = page.get_by_role("tabpanel").filter(has=page.locator("#write"))
        shown = panel.inner_text()
        if number == 1:
            assert "tales" not in shown and "other" not in shown
        page.locator(f"button:has-text('{button}')").click()
        page.locator(f".estimate td:text-is('{number}')").first.wait_for()
        assert re.fullmatch("A: (tales|other), B: (tales|other)", page.locator("#arena-status").inner_text())
        assert len(read_votes(votes)) == number
    assert [vote.score for vote in read_votes(votes)] == [1.0, 0.5]
    assert {vote.first for vote in read_votes(votes)} <= {"tales", "other"}
    assert visitor.errors == []


def test_report_card_is_shown_without_its_scripts(browser, serve, tales, tmp_path):
    card = tmp_path / "report_card.html"
    card.write_text("<h1>Card of tales</h1><script>document.title = 'run'</script>")
    visitor = Visitor(browser, serve([tales], report_cards=[card]))
    visitor.page.get_by_role("tab", name="Report card").click()
    frame = visitor.page.frame_locator(".report-card iframe")
    frame.locator("h1").wait_for()
    assert frame.locator("h1").inner_text() == "Card of tales"


def test_text_of_a_story_is_not_markup(browser, serve, tales):
    visitor = Visitor(browser, serve([tales]))
    visitor.set_options(seed=1, max_new_tokens=3)
    visitor.generate("<img src=x onerror=alert(1)> & <b>bold</b>")
    assert visitor.finished().startswith("<img src=x onerror=alert(1)> & <b>bold</b>")
    assert visitor.page.locator(".story img, .story b").count() == 0
    assert visitor.errors == []
