"""Sharded preparation: files equal to those of one process, and what is kept, written again or rejected."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tinystories_slm.commands.data import run_prepare
from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.config.command_args.data import PrepareArgs
from tinystories_slm.data import prepare, row_groups, story_files
from tinystories_slm.data.prepare import merge_shards, prepare_data, prepare_shard
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.data.token_shards import Shard
from tinystories_slm.errors import UserError

SMALL = TokenizerArgs(vocab_size=300)
NUM_STORIES = 60


@pytest.fixture(autouse=True)
def ten_stories_per_row_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story_files, "_ROW_GROUP_STORIES", 10)


@pytest.fixture
def data(tmp_path: Path) -> DataArgs:
    """30 stories in blocks and 30 plain ones: 5 row groups of training stories and 1 or 2 others."""
    blocks = [f"Words: ball, sad\nStory:\nTom {number} ran.\n" for number in range(NUM_STORIES // 2)]
    plain = [f"Zoë saw 🦊 {number}." for number in range(NUM_STORIES // 2)]
    source = tmp_path / "stories.jsonl"
    source.write_text("".join(json.dumps({"text": story}) + "\n" for story in [*blocks, *plain]))
    return DataArgs(source=str(source), data_dir=tmp_path / "shared", validation_fraction=0.2, seq_len=16)


def contents(data_dir: Path) -> dict[str, bytes]:
    """Return the files of a finished preparation."""
    return {
        path.name: path.read_bytes() for path in data_dir.iterdir() if path.is_file() and path.name != ".lock"
    }


def write_shards(data: DataArgs, num_shards: int, *, tokenizer: TokenizerArgs = SMALL) -> None:
    for rank in reversed(range(num_shards)):
        prepare_shard(data, tokenizer, Shard(rank, num_shards))


def merge_error(data: DataArgs, num_shards: int) -> str:
    with pytest.raises(UserError) as error:
        merge_shards(data, SMALL, num_shards)
    assert "\n" not in str(error.value)
    assert not (data.data_dir / "manifest.json").exists()
    return str(error.value)


@pytest.mark.parametrize("num_shards", [1, 3, 11])
@pytest.mark.parametrize("dtype", ["auto", "uint32"])
def test_merged_shards_equal_the_files_of_one_process(tmp_path, data, num_shards, dtype):
    data = replace(data, token_dtype=dtype)
    whole = replace(data, data_dir=tmp_path / "whole")
    expected = prepare_data(whole, SMALL)
    write_shards(data, num_shards)
    assert merge_shards(data, SMALL, num_shards) == expected == merge_shards(data, SMALL, num_shards)
    files = contents(data.data_dir)
    assert files == contents(whole.data_dir)
    assert {"train.bin", "train.prompts.bin", "validation.bin", "manifest.json"} <= set(files)
    assert not (data.data_dir / "shards").exists()
    assert prepare_shard(data, SMALL, Shard(0, num_shards)) is None  # nothing is left to do


def test_row_groups_are_divided_in_order():
    for num_row_groups in range(12):
        for num_shards in range(1, 9):
            parts = [Shard(rank, num_shards).row_groups(num_row_groups) for rank in range(num_shards)]
            assert [index for part in parts for index in part] == list(range(num_row_groups))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shard_that_is_killed_is_written_again_and_others_are_kept(data, monkeypatch, caplog):
    finished = Shard(0, 3)
    prepare_shard(data, SMALL, finished)
    before = {path: path.stat().st_mtime_ns for path in finished.folder(data.data_dir).iterdir()}
    encode = row_groups._RowGroupEncoder.__call__

    def encode_one_row_group(self: object, row_group: int) -> object:
        if row_group > 1:
            raise KeyboardInterrupt
        return encode(self, row_group)

    killed = Shard(1, 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_groups._RowGroupEncoder, "__call__", encode_one_row_group)
        prepare_shard(data, SMALL, killed)
    names = {path.name for path in killed.folder(data.data_dir).iterdir()}
    assert names == {".lock", "tokens.progress"}
    (killed.folder(data.data_dir) / "train.bin.partial").write_bytes(b"\1\0\2")  # as SIGKILL leaves it
    assert merge_error(data, 3) == (
        f"merge_shards (3): {data.data_dir / 'shards'} is not complete: 1/3 has no complete files, "
        "2/3 has no complete files; run prepare_data with --shard 1/3 and with each of the others"
    )
    caplog.set_level("INFO")
    write_shards(data, 3)
    assert caplog.text.count("using the existing shard") == 1
    assert before == {path: path.stat().st_mtime_ns for path in finished.folder(data.data_dir).iterdir()}
    assert merge_shards(data, SMALL, 3).splits["train"]["num_stories"] > 0


def test_shard_of_another_tokenizer_is_rejected_and_written_again(data, caplog):
    write_shards(data, 3)
    path = Shard(1, 3).folder(data.data_dir) / "shard.json"
    record = json.loads(path.read_text())
    for name, phrase in {
        "tokenizer_sha256": "another tokenizer",
        "revision": "other stories",
        "token_dtype": "another data.token_dtype",
        "code_version": "tokens of another version of this package",
    }.items():
        other = {"token_dtype": "uint32"}.get(name, "0")
        path.write_text(json.dumps(record | {name: other}))
        line = merge_error(data, 3)
        expected = (
            "no complete files" if name == "token_dtype" else phrase
        )  # ids of 4 bytes: the size differs
        assert f"1/3 has {expected}; run prepare_data with --shard 1/3" in line
    prepare_shard(data, SMALL, Shard(1, 3))
    assert "building shard 1/3 again: it has tokens of another version of this package" in caplog.text
    merge_shards(data, SMALL, 3)


def test_other_options_and_damaged_files_are_rejected(data):
    line = merge_error(data, 2)
    assert f"{data.data_dir} has no shards for these options (there is no tokenizer)" in line
    write_shards(data, 2)
    with pytest.raises(
        UserError, match=r"no shards for these options \(tokenizer.vocab_size is 300 .*: 301\)\)"
    ):
        merge_shards(data, TokenizerArgs(vocab_size=301), 2)
    assert "3 more; run" not in merge_error(data, 9)
    assert "7/16 has no complete files, 8 more; run prepare_data with --shard 0/16" in merge_error(data, 16)
    path = Shard(1, 2).folder(data.data_dir) / "train.bin"
    tokens = path.read_bytes()
    path.write_bytes(tokens[:-2] + b"\7\0")
    assert f"{path} is damaged: its SHA-256 differs from that in shard.json; delete" in merge_error(data, 2)
    path.write_bytes(tokens[:-2])
    assert "1/2 has no complete files; run prepare_data with --shard 1/2" in merge_error(data, 2)
    prepare_shard(data, SMALL, Shard(1, 2))
    assert path.read_bytes() == tokens
    merge_shards(data, SMALL, 2)


def test_stories_that_are_replaced_meanwhile_leave_no_shard(data, monkeypatch):
    encode = prepare.write_tokens

    def encode_while_another_process_prepares(*args: object) -> object:
        monkeypatch.setattr(prepare, "write_tokens", encode)
        prepare_data(replace(data, max_stories=30), SMALL)
        return encode(*args)

    monkeypatch.setattr(prepare, "write_tokens", encode_while_another_process_prepares)
    with pytest.raises(
        UserError, match="was prepared with other options meanwhile; run all shards with the same"
    ):
        prepare_shard(data, SMALL, Shard(0, 2))
    assert not (Shard(0, 2).folder(data.data_dir) / "shard.json").exists()


def test_two_workers_of_one_rank_write_one_shard(data, monkeypatch):
    prepare_shard(data, SMALL, Shard(0, 2))  # stories and tokenizer exist
    write, written, both_wait = prepare.write_tokens, [], threading.Event()

    def write_slowly(*args: object) -> object:
        written.append(args)
        both_wait.wait(0.5)
        return write(*args)

    monkeypatch.setattr(prepare, "write_tokens", write_slowly)
    results: list[object] = []
    workers = [
        threading.Thread(target=lambda: results.append(prepare_shard(data, SMALL, Shard(1, 2))))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(written) == 2  # the two splits, once each
    assert results[0] == results[1] is not None
    assert merge_shards(data, SMALL, 2) == Manifest.load(data.data_dir / "manifest.json")


def test_commands_print_counts_and_the_next_step(data, capsys):
    config = PrepareArgs(data=data, tokenizer=SMALL)
    for rank in range(2):
        run_prepare(replace(config, shard=f"{rank}/2"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[3].startswith("shard 1/2, train: ")
    assert lines[5] == "next: prepare_data --merge_shards 2 with the same options, after all shards"
    run_prepare(replace(config, merge_shards=2))
    assert capsys.readouterr().out.splitlines()[-1] == "next: train with the same options"
    run_prepare(replace(config, shard="0/2"))
    assert "the token files are complete; no shard is needed" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["4/4", "1/0", "0", "-1/4", "a/b", "1/4/5", "", " 1/4", "٣/٤"])
def test_shard_that_is_not_rank_and_world_is_rejected(value):
    with pytest.raises(
        UserError, match=r"shard \(.*\): must be RANK/WORLD with RANK below WORLD; use 0/4 to 3/4"
    ):
        PrepareArgs(shard=value)


def test_merge_of_no_shards_or_of_one_shard_is_rejected():
    with pytest.raises(UserError, match=r"merge_shards \(0\): must be at least 1"):
        PrepareArgs(merge_shards=0)
    with pytest.raises(UserError, match=r"merge_shards \(4\): cannot be combined with shard"):
        PrepareArgs(shard="0/4", merge_shards=4)
