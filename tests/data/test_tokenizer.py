"""Tokenizer: exact round trips, correct files, and training on training stories only."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHARED
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data import tokenizer as tokenizer_module
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.tokenizer import (
    TokenizerManifest,
    encode_stories,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    train_tokenizer,
)
from tinystories_slm.errors import UserError

GPT2 = SHARED / "data" / "gpt2"
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason="needs the GPT-2 tokenizer in shared/data/gpt2")

SMALL = TokenizerArgs(vocab_size=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataArgs:
    """Options of a data folder with 300 built-in stories and a vocabulary of 400."""
    args = DataArgs(data_dir=tmp_path_factory.mktemp("data"), max_stories=300, seq_len=64)
    train_tokenizer(args, SMALL)
    return args


@pytest.fixture(scope="module")
def tokenizer(data: DataArgs) -> PreTrainedTokenizerFast:
    return load_tokenizer(data.data_dir / "tokenizer")


def test_vocabulary_and_manifest_match_the_options(
    data: DataArgs, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(tokenizer) == 400
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == 0
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 399)
    assert tokenizer.model_max_length == 64
    manifest = TokenizerManifest.load(data.data_dir / "tokenizer" / "training.json")
    assert (manifest.vocab_size, manifest.requested_vocab_size, manifest.eos_token_id) == (400, 400, 0)
    stories = list(iter_raw_stories(data.data_dir, "validation"))
    num_bytes = sum(len(story.encode()) for story in stories)
    assert manifest.bytes_per_token == num_bytes / sum(map(len, encode_stories(tokenizer, stories))) > 1.8


@given(st.text())
@example("Once  upon\u00a0a   time\n\n\t \r\n <|endoftext|><|endoftext|> 🦊👩‍👧 \x00\x1b e\u0301 \uff46 ")
def test_every_text_round_trips_exactly(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode(text) == [0, *tokenizer.encode(text, add_special_tokens=False)]
    (ids,) = encode_stories(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert not {0, 399} & set(ids)  # no text can produce the ids of end of text and padding


def test_end_of_text_is_plain_text_inside_stories(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode("a<|endoftext|>") == [*tokenizer.encode("a"), 0]
    assert 0 not in encode_stories(tokenizer, ["a<|endoftext|>"])[0]
    assert tokenizer.encode("a<|endoftext|>")[-1] == 0  # encode_stories restored the setting


def test_encode_stories_ignores_earlier_truncation_and_padding(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    long = "Once upon a time. " * 500
    tokenizer([long, "short"], truncation=True, max_length=5, padding=True)
    ids, short = encode_stories(tokenizer, [long, "short"])
    assert tokenizer.decode(ids) == long and tokenizer.decode(short) == "short"


def test_training_is_deterministic(data: DataArgs, tmp_path: Path) -> None:
    again = DataArgs(data_dir=tmp_path, max_stories=300)
    train_tokenizer(again, SMALL)
    name = "tokenizer/tokenizer.json"
    assert (tmp_path / name).read_bytes() == (data.data_dir / name).read_bytes()


def test_sample_is_evenly_spaced_over_training_stories(
    data: DataArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record_and_train(stories: object, vocab_size: int) -> Tokenizer:
        seen.extend(stories)
        return train_bpe(seen, vocab_size)

    monkeypatch.setattr(tokenizer_module, "train_bpe", record_and_train)
    args = DataArgs(data_dir=tmp_path, max_stories=300)
    train_tokenizer(args, TokenizerArgs(vocab_size=300, max_stories=7))
    stories = list(iter_raw_stories(data.data_dir, "train"))
    assert seen == [stories[number * len(stories) // 7] for number in range(7)]
    assert TokenizerManifest.load(tmp_path / "tokenizer" / "training.json").num_stories == 7


def test_few_stories_give_a_smaller_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"ab ab {n}"}) + "\n" for n in range(10)))
    args = DataArgs(source=str(source), data_dir=tmp_path / "data", validation_fraction=0.3)
    train_tokenizer(args, TokenizerArgs(vocab_size=5000))
    actual_size = len(load_tokenizer(tmp_path / "data" / "tokenizer"))
    assert 257 < actual_size < 300
    manifest = TokenizerManifest.load(tmp_path / "data" / "tokenizer" / "training.json")
    assert (manifest.vocab_size, manifest.requested_vocab_size) == (actual_size, 5000)
    assert f"fill only {actual_size} of tokenizer.vocab_size (5000)" in caplog.text


def test_tokenizer_loads_without_this_package(data: DataArgs, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = data.data_dir / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # the class name in transformers 4
    program = """
import sys
import threading
import time
from collections.abc import Iterator
sys.modules["tinystories_slm"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(tokenizer.encode("Once upon a time"), tokenizer.eos_token)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{tokenizer.encode('Once upon a time')} <|endoftext|>"


def test_existing_tokenizer_is_kept_unless_options_change(data: DataArgs, caplog) -> None:
    path = data.data_dir / "tokenizer" / "tokenizer.json"
    before = path.stat().st_mtime_ns
    assert train_tokenizer(data, SMALL) == data.data_dir / "tokenizer"
    with pytest.raises(UserError, match=r"tokenizer \(no/such\) cannot be loaded"):
        train_tokenizer(data, TokenizerArgs(pretrained="no/such"))
    assert path.stat().st_mtime_ns == before  # it stays if there is no other
    train_tokenizer(data, TokenizerArgs(vocab_size=500))
    assert "tokenizer.vocab_size is 400 (configured: 500)" in caplog.text
    assert len(load_tokenizer(path.parent)) == 500
    train_tokenizer(data, SMALL)
    assert len(load_tokenizer(path.parent)) == 400


@needs_gpt2
def test_pretrained_tokenizer_is_copied_with_a_start_token(tmp_path: Path) -> None:
    args = DataArgs(data_dir=tmp_path, max_stories=100, seq_len=32)
    folder = train_tokenizer(args, TokenizerArgs(pretrained=str(GPT2)))
    copy, original = load_tokenizer(folder), AutoTokenizer.from_pretrained(GPT2)
    assert copy.encode("Once upon a time", add_special_tokens=False) == [7454, 2402, 257, 640]
    assert copy.encode("Once upon a time") == [50256, 7454, 2402, 257, 640]
    assert (len(copy), copy.eos_token_id, copy.pad_token_id, copy.model_max_length) == (
        50257,
        50256,
        50256,
        32,
    )
    stories = [*iter_raw_stories(tmp_path, "train"), "  two  blanks\n\n🦊 <|endoftext|>"]
    assert encode_stories(copy, stories) == encode_stories(original, stories)
    manifest = TokenizerManifest.load(folder / "training.json")
    assert (manifest.pretrained, manifest.num_stories, manifest.vocab_size) == (str(GPT2), None, 50257)
    # With a pretrained tokenizer the training options are ignored.
    train_tokenizer(args, TokenizerArgs(pretrained=str(GPT2), vocab_size=300, max_stories=1))


@pytest.mark.parametrize(
    ("name", "value"), [("model_max_length", "x"), ("model_max_length", [1]), ("backend", "\ud800")]
)
def test_values_of_another_type_are_rejected(
    name: str, value: object, data: DataArgs, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(data.data_dir / "tokenizer", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=r"tokenizer \(.*\) cannot be loaded"):
        load_tokenizer(folder)


def test_unusable_tokenizers_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer \(no/such\) cannot be loaded"):
        load_tokenizer("no/such")
    with pytest.raises(UserError, match=r"neither a local folder nor a repository"):
        load_tokenizer("./no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty\) cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a b"], 257)), tmp_path / "no_eos")
    with pytest.raises(UserError, match=r"no_eos\) has no eos token"):
        load_tokenizer(tmp_path / "no_eos")


def test_training_cuts_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_MAX_RUN_CHARS", 4)
    cut = tokenizer_module._cut_long_runs
    assert cut("a bc, def. 12345   ") == ["a bc, def. 1234", "5   "]
    assert cut("a" * 9 + " " * 8 + "!?" * 3) == ["aaaa", "aaaa", "a    ", "    !?!?", "!?"]
    assert cut("one two six ten") == ["one two six ten"]  # 15 characters, no long run


def test_training_time_is_linear_in_a_run() -> None:
    story = "Once upon a time there was a fox."
    start_s = time.process_time()
    for run in (" " * 100_000, "a" * 100_000, "!?" * 50_000):
        assert 270 < train_bpe([story, f"Once{run}upon"], 300).get_vocab_size() <= 300
    assert time.process_time() - start_s < 5  # 0.5 s; without cuts 21 s


def test_ctrl_c_ends_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = random.Random(0).choices("abcdefghij", k=3_000_000)  # 6 s of native work
    stories = ["".join(letters[start : start + 4000]) for start in range(0, len(letters), 4000)]
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start_s = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_bpe(stories, 2000)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - start_s < 4


def test_training_raises_the_error_of_its_stories() -> None:
    def stories() -> Iterator[str]:
        yield "Tom ran."
        raise UserError("a.txt cannot be read")

    with pytest.raises(UserError, match=r"a\.txt cannot be read"):
        train_bpe(stories(), 300)
