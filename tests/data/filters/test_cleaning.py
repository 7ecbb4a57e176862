# ruff: noqa: RUF001
"""Cleaning rules: what each repairs and drops, and what a download keeps of it."""

import json
from itertools import chain

import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.data.filters.cleaning import RULES, Cleaner, choose_rules
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.raw_stories import RawManifest, download_data
from tinystories_slm.data.source_stories import in_validation, open_stories
from tinystories_slm.data.sources.file_formats import read_parquet
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.selection import select_stories
from tinystories_slm.evaluation.training_data import TrainingData

STORY = 'Once upon a time there was a little cat named Tom. "Hello," said the dog to the cat.'

REPAIRED = {
    "encoding": [
        ("She said, â€œI donâ€™t knowâ€\x9d.", "She said, “I don’t know”."),
        ("The cafÃ© was open.", "The café was open."),
        ("A bell\x07 rang\x00.", "A bell rang."),
    ],
    "punctuation": [
        ("“Don’t go,” he said – and left—slowly…", '"Don\'t go," he said - and left - slowly...'),
        ("a\u00a0b\u200b c\ufeff", "a b c"),
    ],
    "blanks": [("  One day,  Tom \n\n\n\nran. \t", "One day, Tom\n\nran.")],
}
DROPPED = {
    "encoding": ["He said \ufffdhello\ufffd to the cat."],
    "separator": [f"{STORY}<|endoftext|>{STORY}", "The end.</s> One day.", "[EOS] Once upon a time."],
    "markup": [
        "See <b>this</b>.",
        "Look at https://example.com now.",
        "**Tom** ran.",
        "# The cat\nTom ran.",
        "a &amp; b",
    ],
    "prompt": [
        "As an AI language model, I cannot tell stories.",
        "Sure! Here's a short story about a cat.",
        "Story: Once upon a time.",
        "Words: cat, dog\nOnce upon a time.",
        "Write a short story about a cat. Once upon a time.",
        "Words: cat, dog\nOnce upon a time there was a cat.\nStory: He ran.",
        "Words: cat\nStory:\n\nSummary: A cat ran.\nOnce upon a time there was a cat.",
        "Words: cat\nStory:\n\nSure! Here's a short story about a cat.",
    ],
    "short": ["The cat ran.", ""],
    "cut_off": [
        "Once upon a time there was a little cat who said to the",
        "He saw the dog,",
        "She had 3",
        "He opened (",
        "And then -",
    ],
    "not_english": [
        "Il était une fois une petite chatte. Elle aimait jouer dans le jardin avec son chat.",
        "Había una vez un niño llamado Tim. Le gustaba jugar con su pelota roja.",
        "Es war einmal ein kleiner Junge. Er spielte gern im Garten mit seinem Hund.",
        "Er was eens een klein meisje. Ze hield van spelen in de tuin.",
    ],
}
KEPT = [
    STORY,
    "He was happy. The end.",
    'She asked, "Why?"',
    "It was a café, said Zoë.",
    "I am sorry, but I broke it, said Tom. Here is a flower.",
    "Words: cat, dog\nFeatures: Dialogue\nStory: Once upon a time there was a cat.",
    "Story:\n\nOnce upon a time there was a cat.",
    "Summary: Write a short story about a cat.\nStory:\n\nThe cat told a Story: it was good.",
    "They ran! 🙂",
]


@pytest.mark.parametrize("rule", RULES)
def test_rule_repairs_drops_and_keeps(rule):
    for before, after in REPAIRED.get(rule, []):
        assert RULES[rule](before) == after
    for text in DROPPED.get(rule, []):
        assert RULES[rule](text) is None, text
    for text in KEPT if rule not in ("short", "punctuation") else [STORY]:
        assert RULES[rule](text) == text


@given(st.text() | st.text("aA. ,\"'\n\t <|>[]&#*é“’—…\u00a0â€œ™\ufffd\x00", max_size=80))
def test_cleaning_a_cleaned_text_changes_nothing(text):
    once = Cleaner().clean(text)
    assert once is None or Cleaner().clean(once) == once


@given(
    st.lists(st.sampled_from([STORY, *KEPT, *chain.from_iterable(DROPPED.values())]) | st.text(max_size=40))
)
def test_every_text_is_kept_or_reported(texts):
    dropped = []
    cleaner = Cleaner(on_drop=lambda text, rule: dropped.append((text, rule)))
    kept = [cleaned for text in texts if (cleaned := cleaner.clean(text)) is not None]
    assert len(kept) + len(dropped) == len(texts)
    assert {rule: cleaner.num_dropped(rule) for rule in RULES} == {
        rule: [name for _, name in dropped].count(rule) for rule in RULES
    }
    assert all(len(count["examples"]) <= 3 for count in cleaner.counts.values())


def test_rules_that_describe_another_kind_of_text_are_left_out():
    assert choose_rules([STORY] * 100) == list(RULES)
    names = ["emma", "olivia", "ava"]
    assert choose_rules(names) == [name for name in RULES if name not in ("short", "cut_off", "not_english")]
    french = DROPPED["not_english"][:1] * 30
    assert [name for name in RULES if name not in choose_rules(french)] == ["not_english"]
    assert choose_rules([STORY] * 80 + french[:20]) == list(RULES)  # a fifth


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def faulty(tmp_path):
    """90 stories, of which 30 have typographic quotes, and 7 faulty ones."""
    stories = [STORY.replace("Tom", f"Tom{number}") for number in range(90)]
    stories[:30] = [story.replace('"', "“") for story in stories[:30]]
    faults = [texts[0] for texts in DROPPED.values()]
    return write_jsonl(tmp_path / "faulty.jsonl", stories[:45] + faults + stories[45:])


def test_download_cleans_counts_and_keeps_what_it_dropped(faulty, tmp_path, caplog):
    data = DataArgs(source=str(faulty), data_dir=tmp_path / "data", cleaning=True, validation_fraction=0.2)
    raw = download_data(data)
    manifest = RawManifest.load(raw / "source.json")
    assert manifest.provenance.cleaning == list(RULES)
    assert {rule: (c["num_changed"], c["num_dropped"]) for rule, c in manifest.cleaning_counts.items()} == {
        "punctuation": (30, 0), **{rule: (0, 1) for rule in DROPPED}
    }  # fmt: skip
    kept = [text for split in ("train", "validation") for text in read_parquet(raw / f"{split}.parquet")]
    dropped = pq.read_table(raw / "dropped.parquet").to_pydict()
    assert (len(kept), len(dropped["text"])) == (90, 7)
    assert dict(zip(dropped["rule"], dropped["text"], strict=True)) == {
        rule: texts[0] for rule, texts in DROPPED.items()
    }
    assert "cleaning, punctuation: 30 stories repaired, 0 dropped" in caplog.text
    # Evaluation selects the same validation stories from the source: the hash is that of the cleaned text.
    [record] = TrainingData.of_run(manifest.provenance)
    texts = list(open_stories(str(faulty), cleaning=record.cleaning)["train"]())
    held_out = [text for text in texts if in_validation(text, 0.2)]
    assert held_out == list(read_parquet(raw / "validation.parquet")) and "“" not in "".join(texts)
    args = EvaluateArgs(model="m", data=str(faulty))
    selection = select_stories(args, manifest.provenance.revision, [record])
    assert (selection.texts, selection.record()["cleaning"]) == (held_out, list(RULES))
    assert prepare_data(data, TokenizerArgs(vocab_size=300)).cleaning_counts == manifest.cleaning_counts


def test_blank_and_null_stories_are_counted_once(tmp_path):
    source = write_jsonl(
        tmp_path / "blank.jsonl", [None, " ", *(f"{STORY} {number}." for number in range(40))]
    )
    options = {"cleaning": True, "validation_fraction": 0.3}
    raw = download_data(DataArgs(source=str(source), data_dir=tmp_path / "data", **options))
    counts = RawManifest.load(raw / "source.json").splits["train"]
    assert (counts["num_null_dropped"], counts["num_empty_dropped"]) == (1, 1)


def test_cleaning_is_off_for_own_files_and_prepared_data_stay(faulty, tmp_path, caplog):
    data = {"source": str(faulty), "data_dir": tmp_path / "data"}
    raw = download_data(DataArgs(**data))
    manifest = json.loads((raw / "source.json").read_text())
    assert (manifest["cleaning"], manifest["deduplicated"]) == ([], False)
    assert not (raw / "dropped.parquet").exists()
    for name in ("cleaning", "deduplicated", "cleaning_counts", "duplicates"):  # of an earlier version
        del manifest[name]
    (raw / "source.json").write_text(json.dumps(manifest))
    download_data(DataArgs(**data))
    assert "again" not in caplog.text
    download_data(DataArgs(cleaning=True, **data))
    assert "data.cleaning is False (configured: True)" in caplog.text
    download_data(DataArgs(deduplicate=True, **data))
    assert "data.deduplicate is False (configured: True)" in caplog.text
    assert (raw / "dropped.parquet").exists()
    with pytest.raises(UserError, match=r"cleaning \(spelling\): must be rules of this version"):
        open_stories(str(faulty), cleaning=["spelling"])


def test_the_builtin_corpus_is_never_filtered(tmp_path):
    data = DataArgs(data_dir=tmp_path / "data", max_stories=50, cleaning=True, deduplicate=True)
    manifest = RawManifest.load(download_data(data) / "source.json")
    assert (manifest.provenance.cleaning, manifest.duplicates) == ([], None)


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs the stories in shared/data")
def test_real_stories_are_repaired_and_none_is_dropped():
    path = SHARED / "data" / "tinystories" / "validation-00000-of-00001.parquet"
    cleaner = Cleaner()
    assert all(cleaner.clean(story) is not None for story in read_parquet(path))
    assert {rule: count["num_changed"] for rule, count in cleaner.counts.items()}.keys() <= {
        "punctuation",
        "blanks",
    }
