"""The page in headless Chromium: what a visitor sees, and what it costs to download."""

import functools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import (
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinystories_slm import TinyStoriesForCausalLM
from tinystories_slm.config import load_config
from tinystories_slm.data.builtin.stories import tell_stories
from tinystories_slm.data.tokenizer import learn_bpe
from tinystories_slm.errors import InputError
from tinystories_slm.export import ExportArgs, browser, export
from tinystories_slm.generation import generate_stories
from tinystories_slm.model_folder import load_model_folder, save_model_folder

EOS = "<|endoftext|>"
STORY = (
    "Once upon a time, there was a naïve little fox 🦊. One day, she climbed up a ladder to the moon.\n\n"
    '"It is cold up here," she said, and she went home to bed.'
)

pytest.importorskip("transformers.exporters", reason="the onnx form needs transformers 5.23")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model folder of the quickstart's shape that has learnt `STORY` by heart, so that it also ends it."""
    backend = learn_bpe([*tell_stories(300), *[STORY] * 3], 2048)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=EOS)
    torch.manual_seed(0)
    config = load_config(ROOT / "configs" / "quickstart.yaml").model_config(vocab_size=2048)
    model = TinyStoriesForCausalLM(config)
    ids = torch.tensor([[0, *tokenizer(STORY).input_ids, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_model_folder(model.eval(), tokenizer, tmp_path_factory.mktemp("run") / "best")


@pytest.fixture(scope="module")
def site(run, tmp_path_factory) -> Path:
    """As exported: its libraries come from jsdelivr.net."""
    return export(ExportArgs(model=str(run), format="onnx", output=tmp_path_factory.mktemp("www") / "site"))


@pytest.fixture(scope="module")
def local_site(site, request) -> Path:
    """The same with its libraries beside it; npm's packages stay in pytest's cache."""
    folder = site.with_name("local")
    shutil.copytree(site, folder)
    try:
        browser.vendor_libraries(folder / "index.html", request.config.cache.mkdir("npm"))
    except InputError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        try:
            # A container has no sandbox to offer; the pages are our own.
            chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"{CHROMIUM} does not start: {error.message[:200]}")
        yield chromium


class _Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")  # as jsdelivr.net does
        self.send_header("Timing-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def server(site) -> Iterator[str]:
    """The address under which `site` and what lies beside it are served."""
    handler = functools.partial(_Handler, directory=site.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


class Visitor:
    """Somebody who opens the page in an empty browser, and all that comes over the wire."""

    def __init__(self, chromium) -> None:
        self.page = chromium.new_context(viewport={"width": 390, "height": 844}).new_page()
        self.bytes: dict[str, int] = {}
        self.errors: list[str] = []
        self.page.on("requestfinished", self._count)
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _count(self, request) -> None:
        self.bytes[request.url] = self.bytes.get(request.url, 0) + request.sizes()["responseBodySize"]

    def tell(
        self, prompt: str = "Once upon a time", *, precision: str = "int8", **settings: object
    ) -> dict | None:
        """Fill in the form, press the button, wait; what the page knows of its story, None after an error."""
        self.page.evaluate("document.querySelector('details').open = true")
        self.page.get_by_label("How does the story begin?").fill(prompt)
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))
        self.page.get_by_label("Weights").select_option(precision)
        self.page.get_by_role("button", name="Tell a story").click()
        self.page.wait_for_selector("#tell:enabled", timeout=60_000)
        told = self.page.locator("#status").get_attribute("data-told")
        return told and json.loads(told)


@pytest.fixture
def visitor(chromium) -> Iterator[Visitor]:
    visitor = Visitor(chromium)
    yield visitor
    visitor.page.context.close()


def test_the_page_tells_the_models_story_for_less_than_25_mb(run, local_site, server, visitor, tmp_path):
    model, tokenizer = load_model_folder(str(run), device="cpu")
    [expected] = generate_stories(model, tokenizer, ["Once upon a time"], temperature=0.0)
    assert expected == STORY  # it has been learnt, or nothing below says much
    ids, prompt_ids = tokenizer([STORY, "Once upon a time"]).input_ids

    visitor.page.goto(f"{server}/local/")
    for precision in ("int8", "float32"):
        told = visitor.tell(precision=precision, temperature=0)
        assert visitor.page.locator("#story").inner_text() == told["text"] == expected
        assert told["end"] == "end"
        assert told["ids"] == [0, *ids]
        assert told["tokens"] == len(ids) - len(prompt_ids) + 1  # with the end token

        served = sum(visitor.bytes.values())
        assert 14e6 < served < 25e6  # onnxruntime's binary alone has 14
        assert told["bytes"] == served  # what the page says of itself
        status = visitor.page.get_by_role("status").inner_text()
        assert re.search(r"The end: \d+ tokens, \d+ tokens per second, .* Total download: \d+\.\d MB", status)
    assert all(url.startswith(server) for url in visitor.bytes)
    assert visitor.errors == []
    picture = tmp_path / "page.png"
    visitor.page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert visitor.page.evaluate(overflow) == 0  # on a phone


def test_a_seed_tells_the_same_story_again_and_a_long_one_ends_with_the_memory(local_site, server, visitor):
    visitor.page.goto(f"{server}/local/")
    wild = {"temperature": 2, "top_k": 0, "top_p": 1}
    first, again, other = (visitor.tell(seed=seed, **wild) for seed in (7, 7, 8))
    assert first["ids"] == again["ids"] != other["ids"]
    assert {len(set(told["ids"])) > 30 for told in (first, other)} == {True}

    unseeded = [visitor.tell(seed="", **wild) for _ in range(2)]
    assert unseeded[0]["seed"] != unseeded[1]["seed"]
    assert {told["end"] for told in (first, other, *unseeded)} <= {"end", "context"}
    assert visitor.errors == []


def test_the_stop_button_stops_and_the_beginning_is_the_visitors(local_site, server, visitor):
    visitor.page.goto(f"{server}/local/")
    script = """new MutationObserver(() => document.getElementById("stop").click())
        .observe(document.getElementById("story"), { childList: true })"""
    told = visitor.tell("Zoë found a key 🗝", temperature=0)
    assert told["text"].startswith("Zoë found a key 🗝") and told["tokens"] > 4
    visitor.page.evaluate(script)
    told = visitor.tell("Zoë found a key 🗝", temperature=0)
    assert told["end"] == "stopped" and told["tokens"] <= 1
    assert visitor.page.get_by_role("status").inner_text().startswith("Stopped: ")
    assert visitor.errors == []


def test_libraries_come_from_the_cdn_where_they_are_not_beside_the_page(site, local_site, server, visitor):
    # The same server by its other name: to a browser that is as foreign as jsdelivr.net.
    cdn = server.replace("127.0.0.1", "localhost") + "/local/vendor/"
    html = (site / "index.html").read_text()
    assert html.count("https://cdn.jsdelivr.net/npm/") == 3 and "vendor/onnx" not in html
    (site / "cdn.html").write_text(html.replace("https://cdn.jsdelivr.net/npm/", cdn))
    visitor.page.goto(f"{server}/site/cdn.html")
    told = visitor.tell(temperature=0)
    assert visitor.errors == []
    assert told["text"] == STORY
    assert sum(size for url, size in visitor.bytes.items() if url.startswith(cdn)) > 14e6
    assert told["bytes"] > 14e6  # the page counts what came from elsewhere, too


def test_what_goes_wrong_is_said_in_words_and_can_be_tried_again(local_site, server, visitor):
    visitor.page.goto(f"{server}/local/")
    error = visitor.page.get_by_role("alert")

    visitor.page.route("**/*.wasm", lambda route: route.abort())
    assert visitor.tell(temperature=0) is None
    assert re.search(r"\.wasm could not be loaded. Is there a connection\?", error.inner_text())
    visitor.page.unroute("**/*.wasm")

    visitor.page.route("**/model_quantized.onnx", lambda route: route.fulfill(status=404))
    assert visitor.tell(temperature=0) is None
    assert "model_quantized.onnx is not there (the server answers 404)" in error.inner_text()
    visitor.page.unroute("**/model_quantized.onnx")

    visitor.page.route("**/model_quantized.onnx", lambda route: route.fulfill(body=b"no graph"))
    assert visitor.tell(temperature=0) is None
    assert "This browser could not start the model" in error.inner_text()
    visitor.page.unroute("**/model_quantized.onnx")

    assert visitor.tell("fox " * 300, temperature=0) is None
    assert "and the model's memory 256: shorten it" in error.inner_text()

    assert visitor.tell(temperature=0)["text"] == STORY
    assert error.inner_text() == ""


def test_tokens_are_drawn_as_transformers_draws_them(local_site, server, visitor):
    visitor.page.goto(f"{server}/local/")
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    draws = 20_000
    script = """async ([logits, settings, draws]) => {
        const { draw, randomNumbers } = await import("./storyteller.js");
        const random = randomNumbers(1), counts = new Array(logits.length).fill(0);
        for (let i = 0; i < draws; i++) counts[draw(Float32Array.from(logits), settings, random)]++;
        return counts;
    }"""
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 10, 1.0), (1.3, 0, 0.8), (1.0, 20, 0.9)):
        settings = {"temperature": temperature, "topK": top_k, "topP": top_p}
        counts = torch.tensor(visitor.page.evaluate(script, [logits.tolist(), settings, draws]))
        expected = _warped(logits, temperature, top_k, top_p)
        assert counts[expected == 0].sum() == 0
        # Six standard deviations, for the fixed seed of the draws.
        assert ((counts - draws * expected).abs() < 6 * (draws * expected).sqrt() + 1).all()
    assert visitor.page.evaluate(script, [logits.tolist(), {"temperature": 0}, 3])[logits.argmax()] == 3


def _warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution that `generate()` draws from."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    return TopPLogitsWarper(top_p)(None, scores).softmax(dim=-1)[0]


def test_a_gpt_model_tells_its_story_too(exported, original, story_tokenizer, local_site, server, visitor):
    folder = local_site.with_name("gpt")
    shutil.copytree(exported("gpt with biases", "onnx"), folder)
    shutil.copytree(local_site / "vendor", folder / "vendor")
    shutil.copyfile(local_site / "index.html", folder / "index.html")
    [expected] = generate_stories(original("gpt with biases"), story_tokenizer, ["Once"], temperature=0.0)
    visitor.page.goto(f"{server}/gpt/")
    told = visitor.tell("Once", precision="float32", temperature=0)
    assert visitor.errors == []
    assert told["text"] == re.sub("\ufffd+$", "", expected)


# transformers.js brings an onnxruntime of its own, of 27 MB; it runs on the page's as well.
TRANSFORMERS_JS = """<!doctype html><link rel="icon" href="data:,">
<script type="importmap">{"imports": {
  "transformers": "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.1/dist/transformers.web.min.js",
  "onnxruntime-web/webgpu": "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/ort.wasm.bundle.min.mjs",
  "onnxruntime-common": "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/ort.wasm.bundle.min.mjs",
  "binary": "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/ort-wasm-simd-threaded.wasm"
}}</script>
<script type="module">
  import { pipeline, env } from "transformers";
  const here = { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/" };
  Object.assign(env, here, { useBrowserCache: false });
  const wasm = import.meta.resolve("binary");
  Object.assign(env.backends.onnx.wasm, { wasmPaths: { wasm }, numThreads: 1 });
  window.tell = async (dtype) => {
    const tell = await pipeline("text-generation", "site", { dtype, device: "wasm" });
    const told = await tell("<|endoftext|>Once upon a time", { max_new_tokens: 250, do_sample: false });
    return told[0].generated_text;
  };
</script>"""


def test_transformers_js_tells_the_same_story(local_site, server, visitor, request):
    page = local_site.parent / "transformers.html"
    page.write_text(TRANSFORMERS_JS)
    browser.vendor_libraries(page, request.config.cache.mkdir("npm"))
    visitor.page.goto(f"{server}/transformers.html")
    visitor.page.wait_for_function("window.tell")
    for dtype in ("fp32", "q8"):
        assert visitor.page.evaluate("(dtype) => window.tell(dtype)", dtype) == STORY
    assert visitor.errors == []


def test_without_npm_vendor_says_so(site, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"vendor \(True\) needs npm, and there is none"):
        browser.write_page(tmp_path, vendor=True)
    with pytest.raises(InputError, match=r"vendor \(True\) is for onnx, not native"):
        ExportArgs(model="x", format="native", output=tmp_path, vendor=True)
