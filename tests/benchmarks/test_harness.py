import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import (
    ROOT,
    Stats,
    bar_chart,
    command,
    fill_table,
    git_revision,
    line_chart,
    markdown_table,
    provenance,
    run_interleaved,
    run_process,
    versions,
    write_result,
)


def test_ratio_is_computed_round_by_round():
    ours, theirs = Stats.of([10, 20, 30]), Stats.of([5, 5, 10])
    assert (ours.median, ours.min, ours.max) == (20, 10, 30)
    assert ours.ratio_to(theirs).values == [2, 4, 3]
    assert ours.ratio_to(theirs).text("{:.1f}") == "3.0 (2.0 to 4.0)"
    assert Stats.of([1234.567]).text() == "1,235"


def test_interleaved_rounds_alternate_their_order():
    order = []
    contenders = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    outcomes = run_interleaved(contenders, rounds=2)
    assert "".join(order) == "abccba"
    assert outcomes == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


def test_peak_memory_is_that_of_the_process():
    ours = bytearray(300_000_000)  # if this process counted, both peaks would be above it
    small = run_process([sys.executable, "-S", "-c", "print('a'); print('b')"])
    large = run_process([sys.executable, "-S", "-c", "x = b'x' * 200_000_000"])
    assert [line.text for line in small.lines] == ["a", "b"]
    assert 0 < small.lines[0].seconds <= small.lines[1].seconds <= small.seconds
    assert small.peak_bytes < 50_000_000
    assert 200_000_000 < large.peak_bytes < 250_000_000
    assert len(ours) == 300_000_000


def test_failed_process_raises_with_its_output():
    with pytest.raises(RuntimeError, match="no such thing"):
        run_process([sys.executable, "-S", "-c", "raise SystemExit('no such thing')"])


def test_result_contains_no_path_of_this_machine(tmp_path):
    inside = [
        "benchmarks/train.py",
        f"--data={ROOT / 'data' / 'x'}",
        "--nanogpt",
        str(tmp_path / "n"),
        "-r=3",
    ]
    assert command(inside) == "python benchmarks/train.py --data=data/x --nanogpt PATH -r=3"
    assert command(["x.py", "--data", "../elsewhere", "--to=../y"]) == "python x.py --data PATH --to=PATH"
    path = write_result("one", {"speed": Stats.of([1.0])}, folder=tmp_path)
    assert json.loads(path.read_text()) == {"speed": {"median": 1, "min": 1, "max": 1, "values": [1]}}
    assert set(versions(["torch", "a package that does not exist"])) == {"torch", "python"}


def test_fill_table_replaces_the_text_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    two = "<!-- table: a -->\n<!-- end of table -->\n"
    page.write_text(f"before\n{two}between\n{two.replace('a -->', 'b -->', 1)}after\n")
    table = markdown_table(["x", "y"], [[1, "z"]])
    assert table == "| x | y |\n|---|---|\n| 1 | z |\n"
    for _ in range(2):
        fill_table(page, "b", table)
    marked = f"<!-- table: b -->\n{table}<!-- end of table -->\n"
    assert page.read_text() == f"before\n{two}between\n{marked}after\n"
    with pytest.raises(ValueError, match="no table"):
        fill_table(page, "c", table)


def commit_all(folder: Path) -> None:
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)


def test_git_revision_reads_the_commit_of_a_checkout(tmp_path):
    (tmp_path / "file").write_text("a")
    commit_all(tmp_path)
    log = ["git", "-C", str(tmp_path), "rev-parse", "HEAD"]
    commit = subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip()
    assert git_revision(tmp_path) == commit[:12]
    (tmp_path / "file").write_text("b")
    assert git_revision(tmp_path) == f"{commit[:12]}-dirty"


def test_git_revision_of_a_source_archive_is_unknown(tmp_path, monkeypatch):
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "train.py").write_text("")
    assert git_revision(archive) == "unknown"
    commit_all(tmp_path)  # an archive unpacked inside another repository
    assert git_revision(archive) == "unknown"
    assert git_revision(tmp_path / "absent") == "unknown"
    monkeypatch.setenv("PATH", "")  # without git
    assert git_revision(tmp_path) == "unknown"


def test_provenance_has_command_machine_and_versions():
    head = provenance()
    assert set(head) == {"command", "machine", "versions"}
    assert set(head["machine"]) == {"processor", "cores", "bf16", "accelerator"}
    assert head["machine"]["processor"] and head["machine"]["cores"] >= 1


def test_charts_are_saved_as_png(tmp_path):
    bars = {"ours": Stats.of([2.0, 3.0]), "theirs": Stats.of([1.0])}
    bar_chart(tmp_path / "bars.png", {"9m": bars, "30m": bars}, xlabel="tokens per second")
    with line_chart(tmp_path / "lines.png", xlabel="step", ylabel="loss") as axes:
        axes.plot([0, 1], [2.0, 1.0], label="a run")
    for name in ("bars.png", "lines.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
