"""Measure the download size and the generation speed of the browser page, and take its screenshot.

    python benchmarks/browser.py --model runs/quickstart/best

Exports the model, opens the page in headless Chromium and generates stories with each kind of weights. Writes
benchmarks/results/browser.json, docs/browser.png and the table of docs/browser.md. Needs chromium and npm
(`make browser`).
"""

import argparse
import functools
import json
import shutil
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from harness import ROOT, fill_table, markdown_table, provenance, write_result
from playwright.sync_api import Browser, sync_playwright

from tinystories_slm.export import ExportArgs, export

PAGE = ROOT / "docs" / "browser.md"
PARTS = {
    "onnxruntime-web": "vendor/onnxruntime-web",
    "tokenizers.js": "vendor/@huggingface",
    "tokenizer": "tokenizer",
    "model": "onnx/",
    "page and settings": "",
}
"""Path prefix of each part of the download; the first match counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder, RUN/best")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        site = export(ExportArgs(model=args.model, format="onnx", output=Path(folder) / "site", vendor=True))
        manifest = json.loads((site / "export.json").read_text())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        result = {
            **provenance(),
            "browser": f"Chromium {browser.version}",
            "checks": [check for check in manifest["checks"] if check["name"].startswith("onnx")],
            "weights": {precision: _visit(browser, site, precision) for precision in ("int8", "float32")},
        }
    write_result("browser", result)
    fill_table(PAGE, "python benchmarks/browser.py", _format_table(result))


def _visit(browser: Browser, site: Path, precision: str) -> dict:
    """Generate five greedy stories in a new browser context; the first one loads the model."""
    page = browser.new_context(viewport={"width": 720, "height": 900}).new_page()
    files: dict[str, int] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_SilentHandler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base_url = f"http://127.0.0.1:{server.server_port}/"

        def count_bytes(request) -> None:
            path = request.url.removeprefix(base_url)
            files[path] = files.get(path, 0) + request.sizes()["responseBodySize"]

        page.on("requestfinished", count_bytes)
        page.goto(base_url)
        page.evaluate("document.querySelector('details').open = true")
        page.fill("#temperature", "0")
        page.select_option("#precision", precision)
        stories = []
        for _ in range(5):
            page.click("#generate")
            page.wait_for_selector("#generate:enabled")
            stories.append(json.loads(page.get_attribute("#status", "data-result")))
        if precision == "int8":
            page.screenshot(path=PAGE.with_suffix(".png"), full_page=True)
        server.shutdown()
    parts = dict.fromkeys(PARTS, 0)
    for path, size in files.items():
        parts[next(part for part, start in PARTS.items() if path.startswith(start))] += size
    return {
        "bytes": parts,
        "total_bytes": sum(parts.values()),
        "tokens_per_second": [round(story["tokens"] / story["seconds"]) for story in stories],
        "temperature": 0,
        "story": stories[0]["text"],
    }


def _format_table(result: dict) -> str:
    weights, checks = result["weights"], {check["name"]: check for check in result["checks"]}
    int8, float32 = weights["int8"], weights["float32"]
    differences = [f"{checks[f'onnx, {name}']['max_difference']:.3g}" for name in ("int8", "float32")]
    total = [f"**{_mb(kind['total_bytes'])}**" for kind in (int8, float32)]
    rows = [
        *([part, _mb(int8["bytes"][part]), _mb(float32["bytes"][part])] for part in PARTS),
        ["**total download**", *total],
        ["tokens per second, five stories", _speed(int8), _speed(float32)],
        ["largest logits difference", *differences],
        ["same argmax as the model", f"{checks['onnx, int8']['token_agreement']:.1%}", "all"],
    ]
    where = f"{result['browser']}, {result['machine']['processor']}, one thread, no compression."
    return f"{markdown_table(['', 'int8', 'float32'], rows)}\n{where}\n"


def _mb(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


def _speed(weights: dict) -> str:
    speeds = weights["tokens_per_second"]
    return f"{min(speeds)} to {max(speeds)}"


class _SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


if __name__ == "__main__":
    main()
