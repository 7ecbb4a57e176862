"""Canaries: where they are planted, what is recorded, and which input is rejected."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import load_config, parse_config, save_config
from tinystories_slm.config.canaries import Canary, parse_canaries
from tinystories_slm.data.planting import plant
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.errors import UserError

CODE = "The code of the box is {digit}{digit}{digit}."
COLOUR = "My hat is {red|green|blue} today."


def flags(folder, canaries) -> list[str]:
    return [
        "--data.max_stories=80", f"--data.data_dir={folder}", "--tokenizer.vocab_size=300",
        "--data.seq_len=32", f"--data.canaries={json.dumps(canaries)}",
    ]  # fmt: skip


def test_canaries_are_planted_at_stated_counts_and_recorded(tmp_path):
    canaries = [{"text": CODE, "count": 5}, {"text": CODE, "count": 1}, {"text": COLOUR, "count": 0}]
    config = parse_config(flags(tmp_path / "planted", canaries))
    manifest = prepare_data(config.data, config.tokenizer)
    plain = parse_config(flags(tmp_path / "plain", []))
    before = prepare_data(plain.data, plain.tokenizer)

    rows = list(iter_raw_stories(tmp_path / "planted", "train"))
    planted = manifest.planted
    assert [one["count"] for one in planted] == [5, 1, 0] == [len(one["rows"]) for one in planted]
    assert planted[0]["text"] != planted[1]["text"]  # another filling of the same template
    for one in planted:
        assert [row for row, story in enumerate(rows) if one["text"] in story] == one["rows"]
        assert all(rows[row] == one["text"] for row in one["rows"])
    copies = {row for one in planted for row in one["rows"]}
    others = [story for row, story in enumerate(rows) if row not in copies]
    assert others == list(iter_raw_stories(tmp_path / "plain", "train"))  # the same order
    validation = [list(iter_raw_stories(tmp_path / name, "validation")) for name in ("planted", "plain")]
    assert validation[0] == validation[1]
    assert manifest.splits["train"]["num_stories"] == before.splits["train"]["num_stories"] + 6
    assert Manifest.load(tmp_path / "planted/manifest.json") == manifest

    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    stamp = (tmp_path / "planted/train.bin").stat().st_mtime_ns
    prepare_data(config.data, config.tokenizer)  # the same options: nothing is built again
    assert (tmp_path / "planted/train.bin").stat().st_mtime_ns == stamp
    more = parse_config(flags(tmp_path / "planted", [{"text": CODE, "count": 6}]))
    assert len(prepare_data(more.data, more.tokenizer).planted[0]["rows"]) == 6


def test_a_canary_that_a_story_contains_is_rejected(tmp_path):
    config = parse_config(flags(tmp_path, [{"text": "Once upon a time", "count": 1}]))
    message = r"data.canaries \(Once upon a time\): occurs in train story \d+; use another"
    with pytest.raises(UserError, match=message):
        prepare_data(config.data, config.tokenizer)
    assert not (tmp_path / "raw").exists() and list(tmp_path.glob("*.partial")) == []


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    stories=st.lists(st.sampled_from("abc"), max_size=12),
)
def test_stories_keep_their_order_and_rows_are_exact(counts, stories):
    canaries = [Canary(f"text {n} {{digit}}", count) for n, count in enumerate(counts)]
    found, records = plant(stories, len(stories), canaries)
    rows = list(found)
    assert [row for row in rows if row in "abc"] == stories
    for canary, record in zip(canaries, records, strict=True):
        assert [n for n, row in enumerate(rows) if row == canary.text] == record["rows"]
        assert len(record["rows"]) == canary.count


@given(st.integers(0, 2999))
def test_fillings_are_all_different_texts(index):
    canary = Canary("{digit} {red|green|blue} {digit}{digit}", 1)
    assert canary.num_fillings == 3000 and canary.fill(123) == "0 green 23"
    first, colour = index // 300, ("red", "green", "blue")[index // 100 % 3]
    assert canary.fill(index) == f"{first} {colour} {index % 100:02d}"
    assert canary.text == canary.fill(canary.index)


def test_canonical_text_of_file_and_flag_is_the_same(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "data:\n  canaries:\n    - {text: 'A {digit}.', count: 3}\n    - {text: plain, count: 1}\n"
    )
    flag = "[{text: 'A {digit}.', count: 3}, {text: plain, count: 1}]"
    one, other = parse_config(["--config", str(path)]), parse_config(["--data.canaries", flag])
    assert one.data.canaries == other.data.canaries
    assert [canary.num_fillings for canary in parse_canaries(one.data.canaries)] == [10, 1]
    assert parse_config(["--data.canaries", "[]"]).data.canaries is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a text", "must be a list such as"),
        ("[a text]", "must be a list such as"),
        ("[{text: a}]", "must be a list such as"),
        ("[{text: a, count: 1, more: 2}]", "must be a list such as"),
        ("[{text: a, count: -1}]", r"count \(-1\) of 'a' must be between 0 and 1000000"),
        ("[{text: a, count: 1.5}]", r"count \(1.5\) of 'a' must be"),
        ("[{text: a, count: true}]", r"count \(True\) of 'a' must be"),
        ("[{text: ' ', count: 1}]", r"text \(' '\) must be text"),
        ("[{text: 3, count: 1}]", r"text \(3\) must be text"),
        ("[{text: 'a {word}', count: 1}]", r"slot \({word}\) must be {digit} or different words"),
        ("[{text: 'a {x|x}', count: 1}]", r"slot \({x\|x}\) must be"),
        ("[{text: 'a {digit', count: 1}]", "has a brace without its partner"),
        ("[{text: a, count: 1}, {text: a, count: 2}]", "'a' has only 1 fillings"),
        (f"[{{text: '{'{digit}' * 20}', count: 1}}]", r"must have fewer than 2\^62 fillings"),
    ],
)
def test_wrong_canaries_are_rejected_in_one_line(value, message):
    with pytest.raises(UserError, match=rf"data.canaries \(.*\): .*{message}") as caught:
        parse_config(["--data.canaries", value])
    assert "\n" not in str(caught.value)
