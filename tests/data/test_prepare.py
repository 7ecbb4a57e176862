"""Token files: exact bytes, manifest, and what is built again with other options."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data import prepare, raw_stories, row_groups, story_files
from tinystories_slm.data import tokenizer as tokenizer_module
from tinystories_slm.data.instruct import parse_block, prompt_text
from tinystories_slm.data.packing import iter_documents
from tinystories_slm.data.prepare import ensure_prepared, prepare_data
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.token_files import Manifest, open_prompt_lengths, open_tokens
from tinystories_slm.data.tokenizer import encode_stories, load_tokenizer
from tinystories_slm.errors import UserError

GPT2 = SHARED / "data" / "gpt2"
SMALL = TokenizerArgs(vocab_size=300)
STORIES = ["Tom ran.", "x", "Zoë saw a 🦊.", "He said <|endoftext|> and left."] * 20
STORIES += [f"story {number}" for number in range(80)]


def data_args(tmp_path: Path, stories: list[str] = STORIES, **options: object) -> DataArgs:
    source = tmp_path / "stories.jsonl"
    source.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    options = {"seq_len": 16, "validation_fraction": 0.3} | options
    return DataArgs(source=str(source), data_dir=tmp_path / "data", **options)


def error_line(data: DataArgs, tokenizer: TokenizerArgs = SMALL) -> str:
    with pytest.raises(UserError) as error:
        ensure_prepared(data, tokenizer)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_token_file_bytes_are_pinned(tmp_path: Path) -> None:
    # A vocabulary of single bytes: id 0 is special, then follows the byte-level alphabet from "!".
    data = data_args(tmp_path, ["!", "#!", "\n", "<|"])
    manifest = prepare_data(data, TokenizerArgs(vocab_size=257))
    tokenizer = load_tokenizer(data.data_dir / "tokenizer")
    bytes_of = {"!": "0100 0000", "#!": "0300 0100 0000", "\n": "c700 0000", "<|": "1c00 5c00 0000"}
    assert tokenizer.convert_tokens_to_ids(["!", "#", "Ċ", "<", "|"]) == [1, 3, 199, 28, 92]
    for split in ("train", "validation"):
        stories = list(iter_raw_stories(data.data_dir, split))
        expected = b"".join(bytes.fromhex(bytes_of[story]) for story in stories)
        assert (data.data_dir / f"{split}.bin").read_bytes() == expected
        assert manifest.splits[split] == {
            "num_stories": len(stories),
            "num_tokens": len(expected) // 2,
            "num_bytes": sum(map(len, stories)),
        }


def test_manifest_matches_the_token_files(tmp_path: Path) -> None:
    data = data_args(tmp_path)
    manifest = ensure_prepared(data, SMALL)
    assert manifest == Manifest.load(data.data_dir / "manifest.json") == ensure_prepared(data, SMALL)
    assert (manifest.token_dtype, manifest.eos_token_id, manifest.vocab_size) == ("uint16", 0, 300)
    provenance = ["source", "revision", "requested_revision", "text_column", "validation_split"]
    provenance += ["validation_fraction", "max_stories", "subset", "cleaning", "canaries", "deduplicated"]
    provenance += ["streaming"]
    counts = ["tokenizer_sha256", "vocab_size", "eos_token_id", "token_dtype", "splits", "code_version"]
    counts += ["parts", "cleaning_counts", "duplicates", "planted"]
    assert list(json.loads((data.data_dir / "manifest.json").read_text())) == provenance + counts
    assert list(json.loads((data.data_dir / "raw/source.json").read_text())) == [
        *provenance,
        "splits",
        "parts",
        "cleaning_counts",
        "duplicates",
        "planted",
    ]
    assert manifest.provenance.source == data.source
    assert manifest.provenance.revision.startswith("sha256:")
    tokenizer = load_tokenizer(data.data_dir / "tokenizer")
    total = 0
    for split, counts in manifest.splits.items():
        stories = list(iter_raw_stories(data.data_dir, split))
        tokens = open_tokens(data.data_dir, split, manifest)
        # One end-of-text id per story, although one story contains the text <|endoftext|>.
        assert int((tokens == 0).sum()) == counts["num_stories"] == len(stories)
        read = [ids.tolist() for ids in iter_documents(tokens, manifest.eos_token_id)]
        assert read == encode_stories(tokenizer, stories)
        assert [tokenizer.decode(ids) for ids in read] == stories
        assert counts["num_bytes"] == sum(len(story.encode()) for story in stories)
        total += len(stories)
    assert total == len(STORIES)


def test_token_files_do_not_depend_on_num_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story_files, "_ROW_GROUP_STORIES", 10)
    monkeypatch.setattr(row_groups, "_MIN_BYTES_PER_WORKER", 1)
    contents = set()
    for num_workers in (1, 2):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        data = data_args(folder, num_workers=num_workers, validation_fraction=0.02)
        prepare_data(data, SMALL)
        contents.add(
            tuple((data.data_dir / f"{split}.bin").read_bytes() for split in ("train", "validation"))
        )
    assert len(contents) == 1


def test_token_dtype_uint32_is_used_if_configured(tmp_path: Path) -> None:
    data = data_args(tmp_path, token_dtype="uint32")
    manifest = ensure_prepared(data, SMALL)
    tokens = open_tokens(data.data_dir, "train", manifest)
    assert manifest.token_dtype == "uint32" and tokens.dtype == np.dtype("<u4")
    assert tokens.nbytes == 4 * manifest.splits["train"]["num_tokens"]
    again = ensure_prepared(replace(data, token_dtype="uint16"), SMALL)
    assert again.token_dtype == "uint16"
    assert open_tokens(data.data_dir, "train", again).tolist() == tokens.tolist()


def test_vocabulary_too_large_for_uint16_is_rejected(tmp_path: Path) -> None:
    data = data_args(tmp_path, token_dtype="uint16")
    assert prepare._token_dtype(data, 2**16) == "uint16"
    with pytest.raises(UserError, match=r"data\.token_dtype \(uint16, 65536 ids\) is too small for .* 65537"):
        prepare._token_dtype(data, 2**16 + 1)
    assert prepare._token_dtype(replace(data, token_dtype="auto"), 2**16 + 1) == "uint32"


def file_times(data_dir: Path) -> dict[str, int]:
    """Return when each stage was written."""
    files = ("raw/source.json", "tokenizer/tokenizer.json", "train.bin", "manifest.json")
    return {name: (data_dir / name).stat().st_mtime_ns for name in files}


@pytest.mark.parametrize(
    ("options", "tokenizer", "rebuilt", "kept"),
    [
        ({"token_dtype": "uint32"}, SMALL, ["train.bin", "manifest.json"], ["stories", "tokenizer"]),
        (
            {},
            TokenizerArgs(vocab_size=301),
            ["tokenizer/tokenizer.json", "train.bin", "manifest.json"],
            ["stories"],
        ),
        ({"max_stories": 30}, SMALL, None, []),
    ],
    ids=["token dtype", "tokenizer", "stories"],
)
def test_changed_options_rebuild_what_depends_on_them(tmp_path, caplog, options, tokenizer, rebuilt, kept):
    data = data_args(tmp_path)
    ensure_prepared(data, SMALL)
    before = file_times(data.data_dir)
    caplog.set_level("INFO")
    caplog.clear()
    manifest = ensure_prepared(replace(data, **options), tokenizer)
    after = file_times(data.data_dir)
    assert [name for name in before if before[name] != after[name]] == (rebuilt or list(before))
    for name in kept:
        assert re.search(rf"using the existing {name} ", caplog.text), name
    new = replace(data, **options, data_dir=tmp_path / "new")
    assert ensure_prepared(new, tokenizer) == manifest  # as if there had been nothing
    for name in ("train.bin", "validation.bin", "tokenizer/tokenizer.json", "raw/train.parquet"):
        assert (new.data_dir / name).read_bytes() == (data.data_dir / name).read_bytes(), name


def test_warning_names_all_differences(tmp_path: Path, caplog) -> None:
    data = data_args(tmp_path)
    ensure_prepared(data, SMALL)
    changed = replace(data, source="builtin", text_column="story", validation_split="holdout", max_stories=90)
    ensure_prepared(changed, TokenizerArgs(vocab_size=301, max_stories=8))
    [stories, tokenizer, tokens] = [r.getMessage() for r in caplog.records if "again" in r.getMessage()]
    for part in (
        f"building the stories of {data.data_dir} again: ",
        f"data.source is '{data.source}' (configured: 'builtin')",
        "data.text_column is 'text' (configured: 'story')",
        "data.validation_split is 'auto' (configured: 'holdout')",
        "data.max_stories is None (configured: 90)",
    ):
        assert part in stories
    assert "tokenizer.vocab_size is 300 (configured: 301)" in tokenizer
    assert "tokenizer.max_stories is 200000 (configured: 8)" in tokenizer
    assert "the tokenizer was built again" in tokens
    caplog.clear()
    ensure_prepared(replace(changed, seq_len=8, num_workers=1), TokenizerArgs(vocab_size=301, max_stories=8))
    assert "again" not in caplog.text  # these options do not affect the files


def test_stories_that_cannot_be_replaced_stay(tmp_path: Path) -> None:
    data = data_args(tmp_path)
    manifest = ensure_prepared(data, SMALL)
    with pytest.raises(UserError, match="has no key 'story'"):
        ensure_prepared(replace(data, text_column="story"), SMALL)
    assert ensure_prepared(data, SMALL) == manifest


STAGES = ("_download", "_build_tokenizer", "_tokenize_splits")


@pytest.mark.parametrize("stage", STAGES)
def test_rebuild_that_is_killed_goes_on(tmp_path: Path, monkeypatch, stage: str) -> None:
    data = data_args(tmp_path)
    ensure_prepared(data, SMALL)
    changed = replace(data, max_stories=30)
    module = dict(zip(STAGES, (raw_stories, tokenizer_module, prepare), strict=True))[stage]

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            ensure_prepared(changed, SMALL)
    finished = file_times(data.data_dir)
    manifest = ensure_prepared(changed, SMALL)
    assert manifest.provenance.max_stories == 30
    stages = ["raw/source.json", "tokenizer/tokenizer.json"]
    num_done = STAGES.index(stage)
    again = file_times(data.data_dir)
    assert all(again[name] == finished[name] for name in stages[:num_done])


def test_modified_or_missing_files(tmp_path: Path, caplog) -> None:
    data = data_args(tmp_path)
    manifest = ensure_prepared(data, SMALL)
    tokenizer_json = data.data_dir / "tokenizer" / "tokenizer.json"
    original = tokenizer_json.read_text()
    tokenizer_json.write_text(original + "\n")
    assert f"{tokenizer_json} is not the tokenizer that was built there" in error_line(data)
    tokenizer_json.unlink()
    assert ensure_prepared(data, SMALL) == manifest
    assert tokenizer_json.read_text() == original

    data_args(tmp_path, [*STORIES, "one more"])
    ensure_prepared(data, SMALL)
    assert "stories.jsonl' has changed from sha256:" in caplog.text
    data_args(tmp_path)
    assert ensure_prepared(data, SMALL) == manifest

    path = data.data_dir / "train.bin"
    num_bytes = 2 * manifest.splits["train"]["num_tokens"]
    path.write_bytes(path.read_bytes()[:-1])
    line = error_line(data)
    assert f"{path} has {num_bytes - 1} bytes, but manifest.json records {num_bytes}" in line
    assert "manifest.json to rebuild the file" in line
    path.unlink()
    assert ensure_prepared(data, SMALL) == manifest  # a missing file is rebuilt with the same bytes
    assert path.stat().st_size == num_bytes
    (data.data_dir / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in error_line(data)
    (data.data_dir / "manifest.json").unlink()  # the fix that the message names
    assert ensure_prepared(data, SMALL) == manifest


def test_tokenizer_of_other_stories_is_built_again(tmp_path: Path, caplog) -> None:
    data = data_args(tmp_path)
    expected = ensure_prepared(data, SMALL)
    manifest = data.data_dir / "tokenizer" / "training.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"revision": "sha256:other"}))
    (data.data_dir / "manifest.json").unlink()
    assert ensure_prepared(data, SMALL) == expected
    assert "has changed from sha256:other to" in caplog.text


def test_fewer_tokens_than_one_window_are_rejected(tmp_path: Path) -> None:
    data = data_args(tmp_path)
    num_tokens = ensure_prepared(data, SMALL).splits["train"]["num_tokens"]
    ensure_prepared(replace(data, seq_len=num_tokens), SMALL)
    line = error_line(replace(data, seq_len=num_tokens + 1))
    assert f"data.seq_len ({num_tokens + 1}) is longer than the {num_tokens} training tokens" in line


def test_prepared_data_needs_no_source_raw_stories_or_write_access(tmp_path: Path) -> None:
    data = data_args(tmp_path)
    manifest = ensure_prepared(data, SMALL)
    Path(data.source).unlink()
    for path in (data.data_dir / "raw").iterdir():
        path.unlink()
    (data.data_dir / ".lock").unlink()
    data.data_dir.chmod(0o500)
    assert ensure_prepared(data, SMALL) == manifest
    data.data_dir.chmod(0o700)
    assert not (data.data_dir / ".lock").exists()


def test_killed_preparation_leaves_no_final_files(tmp_path: Path) -> None:
    data = data_args(tmp_path)
    program = """
import sys, time
from pathlib import Path
from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data import prepare, row_groups, story_files

def encode_slowly(self, row_group):
    print("encoding", row_group, flush=True)
    time.sleep(0.3)
    return encode(self, row_group)

if __name__ == "__main__":
    story_files._ROW_GROUP_STORIES = 3
    encode = row_groups._RowGroupEncoder.__call__
    row_groups._RowGroupEncoder.__call__ = encode_slowly
    data = DataArgs(source=sys.argv[1], data_dir=Path(sys.argv[2]), seq_len=16, validation_fraction=0.3)
    prepare.prepare_data(data, TokenizerArgs(vocab_size=300))
"""
    command = [sys.executable, "-c", program, data.source, str(data.data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "encoding 0\n"
        assert process.stdout.readline() == "encoding 1\n"
        process.kill()
    names = {path.name for path in data.data_dir.iterdir()}
    assert names >= {"raw", "tokenizer", "tokens.progress"}
    assert not names & {"train.bin", "validation.bin", "manifest.json"}
    manifest = ensure_prepared(data, SMALL)
    assert open_tokens(data.data_dir, "train", manifest).size == manifest.splits["train"]["num_tokens"]
    assert not [path for path in data.data_dir.iterdir() if path.suffix in (".partial", ".progress")]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")
def test_workers_exit_after_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text("""
import os, sys, time
from tinystories_slm.data import row_groups

def encode_slowly(row_group):
    print(os.getpid(), flush=True)
    time.sleep(600)

def make_encoder():
    return encode_slowly

if __name__ == "__main__":
    list(row_groups._map_ordered(make_encoder, range(4), 2))
""")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        workers = {int(process.stdout.readline()) for _ in range(2)}
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_is_running(pid) for pid in workers):
        time.sleep(0.05)
    assert not [pid for pid in workers if _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not GPT2.exists(), reason="needs the GPT-2 tokenizer in shared/data/gpt2")
def test_pretrained_tokenizer_separates_stories_with_its_eos(tmp_path: Path) -> None:
    data = data_args(tmp_path)
    manifest = ensure_prepared(data, TokenizerArgs(pretrained=str(GPT2)))
    assert (manifest.eos_token_id, manifest.vocab_size, manifest.token_dtype) == (50256, 50257, "uint16")
    tokens = open_tokens(data.data_dir, "train", manifest)
    assert int((tokens == 50256).sum()) == manifest.splits["train"]["num_stories"]


def test_prompt_lengths_are_those_of_the_blocks(tmp_path: Path) -> None:
    data = DataArgs(source="builtin-instruct", data_dir=tmp_path / "data", max_stories=200)
    manifest = prepare_data(data, TokenizerArgs(vocab_size=500))
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    for split in ("train", "validation"):
        lengths = open_prompt_lengths(data.data_dir, split, manifest)
        stories = list(iter_documents(open_tokens(data.data_dir, split, manifest), manifest.eos_token_id))
        assert len(lengths) == len(stories) == manifest.splits[split]["num_stories"]
        for story, length, text in zip(stories, lengths, iter_raw_stories(data.data_dir, split), strict=True):
            block = parse_block(text)
            assert tokenizer.decode(story[:length]) == prompt_text(block)
            assert tokenizer.decode(story[length:]).strip() == block.story


def test_stories_without_prompts_cannot_be_trained_on_alone(tmp_path: Path) -> None:
    texts = ["Once.", "Story: not a block", "A line.\nStory:\nhm"] * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataArgs(source=str(tmp_path / "a.jsonl"), data_dir=tmp_path / "data", validation_fraction=0.5)
    manifest = prepare_data(data, TokenizerArgs(vocab_size=300))
    assert not list(data.data_dir.glob("*.prompts.bin"))
    with pytest.raises(UserError, match=r"data.loss_on \(story\): the train stories in .* have no prompts"):
        open_prompt_lengths(data.data_dir, "train", manifest)
