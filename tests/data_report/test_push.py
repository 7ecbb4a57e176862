"""Stories pushed to a local Hub, and read back by `datasets` and by `data.source`."""

import json
from pathlib import Path

import datasets
import pytest
import yaml
from data_report.test_data_report import report_args, write_stories
from hub.loopback import Fault, LoopbackHub

from tinystories_slm.config import DataArgs
from tinystories_slm.data.raw_stories import download_data, iter_raw_stories
from tinystories_slm.data_report.push import push_stories
from tinystories_slm.data_report.report import write_data_report
from tinystories_slm.errors import UserError

REPO = "tester/tales"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("a private place")
    args = report_args(write_stories(folder / "tales"), folder / "data")
    return folder, write_data_report(args)


def push(prepared, *flags: str) -> str:
    folder, report = prepared
    return push_stories(report_args(folder / "tales", folder / "data", f"--push={REPO}", *flags), report)


def test_push_is_one_commit_that_reads_back_equal(hub: LoopbackHub, prepared, tmp_path, capsys, monkeypatch):
    commit = push(prepared, "--license=mit")
    repository = hub.repositories[REPO]
    names = {"README.md", "report.html", "report.json", "data/train.parquet", "data/validation.parquet"}
    assert set(repository.head.files) == {".gitattributes", *names} and len(repository.commits) == 2
    assert f"datasets/{REPO} at commit {commit}" in capsys.readouterr().out
    for name in ("README.md", "report.json", "report.html"):
        assert b"a private place" not in repository.head.files[name].data
    card = repository.head.files["README.md"].data.decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert list((prepared[0] / "data").glob(".push_*")) == []

    original = prepared[0] / "data"
    expected = {split: list(iter_raw_stories(original, split)) for split in ("train", "validation")}
    again = DataArgs(source=REPO, data_dir=tmp_path / "again")
    download_data(again)
    assert {split: list(iter_raw_stories(again.data_dir, split)) for split in expected} == expected

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    loaded = datasets.load_dataset(REPO, cache_dir=str(tmp_path / "datasets"))
    assert {split: loaded[split]["text"][:] for split in loaded} == expected


def test_second_push_uploads_only_what_changed(hub: LoopbackHub, prepared, capsys):
    first = push(prepared)
    capsys.readouterr()
    assert push(prepared) == first and "nothing has changed" in capsys.readouterr().out
    assert push(prepared, "--license=mit") != first
    assert "new or changed: 1 of 5 files" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"private: tester/tales already exists and is public.*another --push"
    ):
        push(prepared, "--private=true")


def test_failed_push_leaves_the_dataset_and_no_copy(hub: LoopbackHub, prepared, monkeypatch):
    hub.faults = [Fault("POST", "/commit/", kind=500, times=9)]
    with pytest.raises(UserError, match=r"^push \(tester/tales\): the Hub rejected the push \(500"):
        push(prepared)
    assert list(hub.repositories[REPO].head.files) == [".gitattributes"]
    data_dir = prepared[0] / "data"
    (data_dir / "report.json").write_text(json.dumps("hf_" + "a" * 20))
    with pytest.raises(UserError, match=r"report\.json holds an access token .* from the file of the data"):
        push(prepared)
    assert list(data_dir.glob(".push_*")) == []
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no access token was found"):
        push(prepared)
