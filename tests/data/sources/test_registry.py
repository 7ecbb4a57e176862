import pytest

from tinystories_slm import grammar
from tinystories_slm.data.sources.builtin import BuiltinSource
from tinystories_slm.data.sources.hub import HubSource
from tinystories_slm.data.sources.local import LocalSource
from tinystories_slm.data.sources.registry import find_recorded_source, find_source

COMMIT, CHECKSUM = "f54c09fd" * 5, f"sha256:{'0' * 64}"
TINY = "roneneldan/TinyStories"


def test_the_value_decides_the_kind_of_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    kinds = {
        "builtin": BuiltinSource,
        "roneneldan/TinyStories": HubSource,
        "two words": HubSource,
        "\u00e9" * 300: HubSource,  # no file system has such a name
        **dict.fromkeys(["folder", "./none", "none.parquet", "~nobody/x", "a/b/c", "/no", ""], LocalSource),
    }
    assert {value: type(find_source(value)) for value in kinds} == kinds


@pytest.mark.parametrize(
    ("value", "revision", "kind", "public_name", "dataset_id", "has_license"),
    [
        ("builtin", f"grammar {grammar.VERSION}", BuiltinSource, "builtin", None, True),
        (
            "roneneldan/TinyStories",
            COMMIT,
            HubSource,
            "roneneldan/TinyStories",
            "roneneldan/TinyStories",
            True,
        ),
        ("tester/other", COMMIT, HubSource, "tester/other", "tester/other", False),
        ("a/gone.jsonl", CHECKSUM, LocalSource, "gone.jsonl", None, False),
        ("gone", CHECKSUM, LocalSource, "gone", None, False),
    ],
)
def test_a_record_decides_the_facts_of_a_source(value, revision, kind, public_name, dataset_id, has_license):
    """The source itself may be missing, and a folder name alone looks like a Hub id."""
    source = find_recorded_source(value, revision)
    assert type(source) is kind
    assert (source.public_name(), source.dataset_id) == (public_name, dataset_id)
    assert (source.license is not None) == has_license


def test_a_record_of_an_unknown_kind_has_no_source():
    assert find_recorded_source("random-ids", "random") is None
    assert find_recorded_source("roneneldan/TinyStories", None) is None
