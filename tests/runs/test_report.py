import json
import math
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, brightness

from tinystories_slm.config import save_config
from tinystories_slm.config.command_args.reports import ReportArgs
from tinystories_slm.errors import UserError
from tinystories_slm.runs.recorder import RunRecorder
from tinystories_slm.runs.report import report, write_report

HOSTILE = "<script>alert(1)</script>\"'&amp; {{ 7 * 7 }}"


@pytest.fixture
def run_dir(tiny_run, data_dir) -> Path:
    """A run at step 900 of 1,200: 180 lines, three evaluations, stories with markup."""
    config = tiny_run("--train.max_steps", "1200", "--model.family", "llama", "--model.qk_norm", "true")
    folder = config.output_dir
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    shutil.copy(data_dir / "manifest.json", folder)
    recorder = RunRecorder(folder)
    for step in range(5, 901, 5):
        metrics = {
            "train/loss": 0.5 + 4 * math.exp(-step / 150),
            "train/lr": 1e-3 * (1 - step / 1200),
            "train/grad_norm": 1.0 + math.sin(step) / 3,
            "train/tokens_per_second": 12_000 + 50 * (step % 17),
            "train/mfu": 0.3,
            "seconds": step / 2,
        }
        recorder.log(metrics, step=step, tokens=step * 256)
        if step % 300 == 0:
            recorder.log({"val/loss": 0.6 + 4 * math.exp(-step / 150)}, step=step, tokens=step * 256)
            recorder.log_sample(f"Once upon a time there were {step} foxes.\n\n{HOSTILE}", step=step)
    environment = {
        "hardware": "AMD EPYC, 2 cores, 23 GB",
        "packages": {"python": "3.11.2", "torch": "2.13.0"},
    }
    (folder / "environment.json").write_text(json.dumps(environment | {"peak_flops_per_second": 2e11}))
    return folder


def add_evaluation(run_dir: Path) -> None:
    evaluation = {"loss": 0.2446, "bits_per_byte": 0.0916, "accuracy": 0.9005, "num_stories": 1000}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation | {"by_position": [1.0, 2.0]}))
    stories = [
        {"prompt": "Once", "story": f"Once upon a time, story {i}. {HOSTILE}", "seed": i} for i in range(3)
    ]
    (run_dir / "stories.jsonl").write_text("".join(json.dumps(story) + "\n" for story in stories))


def test_report_is_one_file_with_the_contents_of_the_run(run_dir):
    add_evaluation(run_dir)
    update = json.loads((run_dir / "evaluation.json").read_text()) | {"data": str(run_dir / "tales.txt")}
    (run_dir / "evaluation.json").write_text(json.dumps(update))
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert len(page) < 300_000
    for text in (
        "step 900 of 1,200", "trained on builtin", "at step 900; corpus entropy", "in 8 min",
        "30% of the device", "AMD EPYC, 2 cores, 23 GB", "2.13.0", "0.2 TFLOP/s per process", "0.0916",
        "90.0%", "1,000", ".../tales.txt",
        "there were 300 foxes", "there were 900 foxes", "story 2.", "qk_norm", "weight_decay",
    ):  # fmt: skip
        assert text in page, text
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page and "49" not in page.split("{{ 7 * 7 }}")[0][-20:]
    assert str(run_dir.parent) not in page  # no path of this machine
    assert [path.name for path in run_dir.iterdir() if "partial" in path.name] == []


def test_report_of_a_run_without_metrics(tiny_run):
    config = tiny_run()
    config.output_dir.mkdir()
    save_config(config, config.output_dir / "config.yaml")
    page = write_report(config.output_dir).read_text(encoding="utf-8")
    assert "step 0 of 12" in page and "No step has been logged yet" in page


def test_report_of_a_run_of_another_version(run_dir):
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["train"]["lr"]
    config["train"]["unheard_of"] = 17
    path.write_text(yaml.dump(config))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "train/loss": NaN}\n')
    assert "unheard_of" in write_report(run_dir).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", [b"", b"3", b"[]", b"train: 3", b"{}", b"\xff\xfe", b"a: [", b"train: {max_steps: x}"]
)
def test_damaged_configuration_is_a_one_line_error(run_dir, text):
    (run_dir / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"^[^\n]*config\.yaml (must hold|cannot be read)[^\n]*$"):
        write_report(run_dir)


def test_damaged_records_are_skipped(run_dir):
    """A line is no measurement without its step; text may have been cut within a letter."""
    for name, text in (
        ("metrics.jsonl", b"{}\n[" * 2 + b"[" * 10**5),
        ("stories.jsonl", b'{"story": "\xff"}'),
    ):
        path = run_dir / name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + text)
    (run_dir / "samples.md").write_bytes((run_dir / "samples.md").read_bytes() + b"\xff")
    assert "step 900 of 1,200" in write_report(run_dir).read_text(encoding="utf-8")


def test_report_of_a_long_run_stays_small(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in range(1000, 50_000):
            file.write(
                json.dumps({"step": step, "tokens": step, "train/loss": 1 / step, "train/lr": 1e-3}) + "\n"
            )
    recorder = RunRecorder(run_dir, step=10**6)
    for step in range(1000, 50_000, 100):
        recorder.log_sample("Once upon a time. " * 60, step=step)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert len(page) < 400_000
    assert "step 300<" in page and "step 49,900<" in page and page.count("<details") == 12


def test_failed_write_keeps_the_previous_report(run_dir, monkeypatch):
    before = write_report(run_dir).read_text(encoding="utf-8")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text(encoding="utf-8") == before


def test_report_rejects_other_directories(tmp_path):
    with pytest.raises(UserError, match=r"run \(.*\) is not a run directory: config.yaml does not exist"):
        report(ReportArgs(run=tmp_path))


def test_script_writes_the_report(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--run", str(run_dir)])
    runpy.run_path(str(ROOT / "scripts" / "report.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").is_file()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_renders_in_a_browser(run_dir, browser, tmp_path, width, height, scheme):
    add_evaluation(run_dir)
    errors, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(write_report(run_dir).as_uri())

    assert page.locator("h1").inner_text() == "run"
    assert page.locator("h2").all_inner_texts() == [
        "Curves", "Stories over time", "Evaluation", "Configuration", "Environment",
    ]  # fmt: skip
    charts = page.locator("svg.chart:visible")
    assert [svg.get_attribute("aria-label") for svg in charts.all()] == [
        "loss", "Learning rate", "Gradient norm", "Throughput", "Utilization",
    ]  # fmt: skip
    for curve in page.locator("svg.chart:visible polyline").all():
        box = curve.bounding_box()
        assert box["width"] > width / 5 and box["x"] >= 0 and box["x"] + box["width"] <= width
    assert charts.first.locator("line.level").count() == 1  # corpus entropy
    text, back = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(text) > brightness(back)) == (scheme == "dark")

    assert page.get_by_text("there were 900 foxes").last.is_visible()
    assert not page.locator("details").first.locator("p").first.is_visible()
    page.locator("summary").first.click()
    assert page.locator("details").first.get_by_text("there were 300 foxes").last.is_visible()

    charts.first.scroll_into_view_if_needed()
    box = charts.first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#tip")
    assert tip.is_visible() and "training" in tip.inner_text() and "validation" in tip.inner_text()
    tip_box = tip.bounding_box()
    assert tip_box["x"] >= 0 and tip_box["x"] + tip_box["width"] <= width
    page.mouse.move(1, 1)
    assert not tip.is_visible()

    assert page.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
    picture = page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert not errors
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()
