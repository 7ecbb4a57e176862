import json
import sys

import pytest
from measuring import (
    ROOT,
    Spread,
    command,
    fill_table,
    interleaved,
    markdown_table,
    run_process,
    versions,
    write_result,
)


def test_a_ratio_is_taken_round_by_round():
    ours, theirs = Spread.of([10, 20, 30]), Spread.of([5, 5, 10])
    assert (ours.median, ours.min, ours.max) == (20, 10, 30)
    assert ours.over(theirs).values == [2, 4, 3]
    assert ours.over(theirs).text("{:.1f}") == "3.0 (2.0 to 4.0)"
    assert Spread.of([1234.567]).text() == "1,235"


def test_contenders_take_turns_and_turn_round():
    order = []
    contenders = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    outcomes = interleaved(contenders, rounds=2)
    assert "".join(order) == "abccba"
    assert outcomes == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


def test_the_peak_is_that_of_the_process_and_not_ours():
    ours = bytearray(300_000_000)  # were this process's memory counted, both would be above it
    small = run_process([sys.executable, "-S", "-c", "print('a'); print('b')"])
    large = run_process([sys.executable, "-S", "-c", "x = b'x' * 200_000_000"])
    assert [line.text for line in small.lines] == ["a", "b"]
    assert 0 < small.lines[0].seconds <= small.lines[1].seconds <= small.seconds
    assert small.peak_bytes < 50_000_000
    assert 200_000_000 < large.peak_bytes < 250_000_000
    assert len(ours) == 300_000_000


def test_a_process_that_fails_says_what_it_printed():
    with pytest.raises(RuntimeError, match="no such thing"):
        run_process([sys.executable, "-S", "-c", "raise SystemExit('no such thing')"])


def test_a_result_names_no_folder_of_this_machine(tmp_path):
    inside = [
        "benchmarks/train.py",
        f"--data={ROOT / 'data' / 'x'}",
        "--nanogpt",
        str(tmp_path / "n"),
        "-r=3",
    ]
    assert command(inside) == "python benchmarks/train.py --data=data/x --nanogpt PATH -r=3"
    assert command(["x.py", "--data", "../elsewhere", "--to=../y"]) == "python x.py --data PATH --to=PATH"
    path = write_result("one", {"speed": Spread.of([1.0])}, folder=tmp_path)
    assert json.loads(path.read_text()) == {"speed": {"median": 1, "min": 1, "max": 1, "values": [1]}}
    assert set(versions(["torch", "a package that is not there"])) == {"torch", "python"}


def test_a_table_is_kept_between_its_marks(tmp_path):
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
