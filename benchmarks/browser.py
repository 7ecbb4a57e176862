"""What a visitor of the story page downloads, how fast it tells, and how it looks.

    python benchmarks/browser.py --model runs/quickstart/best

Exports the model, opens the page in headless Chromium and has each kind of weights tell a story. Writes
benchmarks/results/browser.json, docs/browser/screenshot.png and the tables of docs/browser/README.md.
Needs chromium and npm (`make browser`).
"""

import argparse
import functools
import json
import re
import shutil
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from measuring import ROOT, machine
from playwright.sync_api import Browser, sync_playwright

from tinystories_slm.export import ExportArgs, export

README = ROOT / "docs" / "browser" / "README.md"
PARTS = {
    "onnxruntime-web": "vendor/onnxruntime-web",
    "tokenizers.js": "vendor/@huggingface",
    "tokenizer": "tokenizer",
    "model": "onnx/",
    "page and settings": "",
}
"""What a file belongs to, by the beginning of its path; the first that fits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder, RUN/best")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        site = export(ExportArgs(model=args.model, format="onnx", output=Path(folder) / "site", vendor=True))
        record = json.loads((site / "export.json").read_text())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        result = {
            "machine": machine(),
            "browser": f"Chromium {browser.version}",
            "checks": [check for check in record["checks"] if check["name"].startswith("onnx")],
            "weights": {precision: _visit(browser, site, precision) for precision in ("int8", "float32")},
        }
    (ROOT / "benchmarks" / "results" / "browser.json").write_text(json.dumps(result, indent=2) + "\n")
    text = README.read_text(encoding="utf-8")
    README.write_text(
        re.sub(r"(?<=<!-- tables -->\n).*(?=<!-- end -->)", lambda _: _tables(result), text, flags=re.S),
        encoding="utf-8",
    )


def _visit(browser: Browser, site: Path, precision: str) -> dict:
    """An empty browser, a first story, which loads the model, and four more, each time the likeliest."""
    page = browser.new_context(viewport={"width": 720, "height": 900}).new_page()
    files: dict[str, int] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"

        def count(request) -> None:
            path = request.url.removeprefix(address)
            files[path] = files.get(path, 0) + request.sizes()["responseBodySize"]

        page.on("requestfinished", count)
        page.goto(address)
        page.evaluate("document.querySelector('details').open = true")
        page.fill("#temperature", "0")
        page.select_option("#precision", precision)
        told = []
        for _ in range(5):
            page.click("#tell")
            page.wait_for_selector("#tell:enabled")
            told.append(json.loads(page.get_attribute("#status", "data-told")))
        if precision == "int8":
            page.screenshot(path=README.with_name("screenshot.png"), full_page=True)
        server.shutdown()
    parts = dict.fromkeys(PARTS, 0)
    for path, size in files.items():
        parts[next(part for part, start in PARTS.items() if path.startswith(start))] += size
    return {
        "bytes": parts,
        "total_bytes": sum(parts.values()),
        "tokens_per_second": [round(story["tokens"] / story["seconds"]) for story in told],
        "temperature": 0,
        "story": told[0]["text"],
    }


def _tables(result: dict) -> str:
    weights, checks = result["weights"], {check["name"]: check for check in result["checks"]}
    int8, float32 = weights["int8"], weights["float32"]
    lines = ["| | int8 | float32 |", "|---|---:|---:|"]
    for part in PARTS:
        lines.append(f"| {part} | {_mb(int8['bytes'][part])} | {_mb(float32['bytes'][part])} |")
    lines += [
        f"| **whole download** | **{_mb(int8['total_bytes'])}** | **{_mb(float32['total_bytes'])}** |",
        f"| tokens per second, of five stories | {_speed(int8)} | {_speed(float32)} |",
        "| largest logits difference | {:.3g} | {:.3g} |".format(
            *(checks[f"onnx, {name}"]["max_difference"] for name in ("int8", "float32"))
        ),
        f"| likeliest token as the model's | {checks['onnx, int8']['agreement']:.1%} | all |",
    ]
    where = f"{result['browser']}, {result['machine']['processor']}, one thread, no compression."
    return "\n".join([*lines, "", where, ""])


def _mb(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


def _speed(weights: dict) -> str:
    speeds = weights["tokens_per_second"]
    return f"{min(speeds)} to {max(speeds)}"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


if __name__ == "__main__":
    main()
