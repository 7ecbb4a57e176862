"""Streams: the batches of token files, in chunks, from any position, and in bounded memory."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from hub.conftest import hub_connection
from hub.loopback import Fault, LoopbackHub
from published_sets import publish_folder, publish_tinystories
from story_files import compress, write_jsonl, write_parquet, write_text

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data import raw_stories
from tinystories_slm.data.packing import PACKINGS, Batch, PackedDataset, iter_documents
from tinystories_slm.data.prepare import ensure_prepared
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.sources.local import LocalSource
from tinystories_slm.data.streaming import StreamedDataset, StreamError, chunks, open_stream
from tinystories_slm.data.token_files import Manifest, open_prompt_lengths, open_tokens
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.errors import UserError

SMALL = TokenizerArgs(vocab_size=300)
STORIES = [f"Tom saw {number} foxes{' and hens' * (number % 5)}. The end." for number in range(120)]
EVERYTHING = 2**22
SOME = 300  # tokens of a chunk: about 15 stories


@pytest.fixture(autouse=True)
def few_stories_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_BATCH_STORIES", 4)


def parquet_folder(folder: Path) -> Path:
    for number in range(3):
        write_parquet(folder / f"train-{number}.parquet", STORIES[40 * number : 40 * (number + 1)])
    write_parquet(folder / "validation-0.parquet", STORIES[:5])
    return folder


def jsonl_gz(folder: Path) -> Path:
    folder.mkdir()
    return compress(write_jsonl(folder / "stories.jsonl", [*STORIES, None, " "]), ".gz")


def text_folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(2):
        write_text(folder / f"part-{number}.txt", STORIES[60 * number : 60 * (number + 1)])
    return folder


FORMS = (parquet_folder, jsonl_gz, text_folder)


def data_args(tmp_path: Path, source: Path | str, **options: object) -> DataArgs:
    values = {"streaming": True, "streaming_chunk_tokens": SOME, "seq_len": 16, "text_column": "text"}
    return DataArgs(source=str(source), data_dir=tmp_path / "data", **values | options)


def open_prepared(data: DataArgs, **options: object) -> tuple[Manifest, StreamedDataset]:
    """Prepare the sample and open the stream."""
    manifest = ensure_prepared(data, SMALL)
    return manifest, open_stream(data, manifest, seed=3, **options)


def open_files(data: DataArgs) -> PackedDataset:
    """Prepare the same stories without a stream, and open their token file."""
    data = replace(data, streaming=False, data_dir=data.data_dir.parent / "whole")
    manifest = ensure_prepared(data, SMALL)
    has_prompts = data.loss_on == "story"
    return PACKINGS[data.packing](
        data.data_dir / "train.bin",
        token_dtype=manifest.token_dtype,
        seq_len=data.seq_len,
        seed=3,
        eos_token_id=manifest.eos_token_id,
        mask_across_stories=data.mask_across_stories,
        prompt_lengths=open_prompt_lengths(data.data_dir, "train", manifest) if has_prompts else None,
    )


def assert_equal(actual: Batch, expected: Batch) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one is other is None or np.array_equal(one, other)
    assert (actual.labels is actual.input_ids) == (expected.labels is expected.input_ids)


def stories_of(windows: StreamedDataset, data: DataArgs, *, epochs: int) -> list[list[str]]:
    """Return the text of the stories in the chunks of each of the first epochs."""
    tokenizer = load_tokenizer(data.data_dir / "tokenizer")
    found: list[list[str]] = [[] for _ in range(epochs)]
    for chunk in windows._reader.iter_chunks(windows._next_position):
        if chunk.start.epoch == epochs:
            return found
        ids = iter_documents(chunk.ids, tokenizer.eos_token_id)
        found[chunk.start.epoch] += [tokenizer.decode(story) for story in ids]
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"packing": "contiguous"},
        {"packing": "document", "mask_across_stories": True},
        {"packing": "best_fit", "mask_across_stories": True},
    ],
    ids=["contiguous", "document, masked", "best fit, masked"],
)
def test_stream_of_one_chunk_has_the_batches_of_a_token_file(tmp_path, write, options):
    data = data_args(tmp_path, write(tmp_path / "source"), streaming_chunk_tokens=EVERYTHING, **options)
    _, stream = open_prepared(data)
    files = open_files(data)
    for step in range(3 * len(files) // 8):  # three epochs
        assert_equal(stream.batch(step, 8), files.batch(step, 8))
        assert_equal(stream.batch(step, 8, rows=slice(2, 5)), files.batch(step, 8, rows=slice(2, 5)))
    stream.close()


@pytest.mark.parametrize("write", FORMS)
def test_every_epoch_of_many_chunks_has_each_training_story_once(tmp_path, write):
    data = data_args(tmp_path, write(tmp_path / "source"))
    _, stream = open_prepared(data)
    open_files(data)
    expected = list(iter_raw_stories(tmp_path / "whole", "train"))
    assert stories_of(stream, data, epochs=2) == [expected, expected]  # in the order of the source


def test_windows_of_an_epoch_predict_the_tokens_of_its_stories(tmp_path):
    data = data_args(tmp_path, parquet_folder(tmp_path / "source"))
    manifest, stream = open_prepared(data)
    num_windows, step = 0, 0
    while True:
        stream.batch(step, 1)
        if stream._chunks[0].chunk.start.epoch == 1:
            break
        num_windows, step = num_windows + 1, step + 1
    assert stream._chunks[0].number == 5  # the chunks of the first epoch
    stream.close()
    _, stream = open_prepared(data)
    predicted = Counter(
        token for step in range(num_windows) for token in stream.batch(step, 1).input_ids[0, 1:].tolist()
    )
    stream.close()
    # The sample holds all of these few stories. The last window of a chunk ends in its first one.
    tokens = Counter(open_tokens(data.data_dir, "train", manifest).tolist())
    assert not tokens - predicted
    num_chunks = -(-tokens.total() // SOME)
    assert predicted.total() - tokens.total() <= num_chunks * (data.seq_len - 2)


@pytest.mark.parametrize("form", [parquet_folder, jsonl_gz, "mixture"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_stream_continues_at_any_step(tmp_path, form, packing):
    if form == "mixture":
        a, b = parquet_folder(tmp_path / "a"), text_folder(tmp_path / "b")
        source = [{"name": str(a), "weight": 3}, {"name": str(b), "weight": 2}]
        data = replace(data_args(tmp_path, "."), source=source, packing=packing)
    else:
        data = data_args(tmp_path, form(tmp_path / "source"), packing=packing)
        data = replace(data, max_stories=100 if form is jsonl_gz else None)
    _, whole = open_prepared(data)
    batches, positions = [], []
    for step in range(100):
        positions.append(json.dumps(whole.stream_position(step, 7)))
        batches.append(whole.batch(step, 7))
        read, not_read_yet = whole.stream_position(step, 7), json.loads(positions[-1])
        for name in ("chunk", "first_window"):  # the end of an epoch is the start of the next one
            assert read[name] == not_read_yet[name]
    whole.close()
    epochs = [json.loads(position)["stories"]["epoch"] for position in positions]
    assert max(epochs) >= 1 and len(set(positions)) > 8
    for step in range(0, 100, 9):
        _, resumed = open_prepared(data, position=json.loads(positions[step]))
        for later in range(step, min(step + 8, 100)):
            assert_equal(resumed.batch(later, 7), batches[later])
        resumed.close()


def test_mixture_has_the_stories_of_the_prepared_mixture(tmp_path):
    a, b = parquet_folder(tmp_path / "a"), text_folder(tmp_path / "b")
    source = [{"name": str(a), "weight": 2}, {"name": str(b)}]
    data = replace(data_args(tmp_path, "."), source=source, validation_split="holdout", max_stories=100)
    _, stream = open_prepared(data)
    open_files(data)
    expected = list(iter_raw_stories(tmp_path / "whole", "train"))
    assert stories_of(stream, data, epochs=2) == [expected, expected]


@pytest.mark.parametrize("max_stories", [None, 50])
def test_held_out_and_dropped_stories_are_those_of_the_download(tmp_path, max_stories):
    source = tmp_path / "stories.jsonl"
    faulty = ["<b>Tom</b> ran home and the end was near, he said.", None, "  ", "Tom ran"]
    long = [f"{story} He saw “them” and they were all very happy then." for story in STORIES]
    write_jsonl(source, [*long[:60], *faulty, *long[60:]])
    options = {"cleaning": True, "validation_fraction": 0.2, "max_stories": max_stories}
    data = data_args(tmp_path, source, **options)
    manifest, stream = open_prepared(data)
    open_files(data)
    expected = list(iter_raw_stories(tmp_path / "whole", "train"))
    assert manifest.provenance.cleaning and 0 < len(expected) < (max_stories or 120)
    assert stories_of(stream, data, epochs=2) == [expected, expected]


def test_prompts_of_blocks_are_not_trained_on(tmp_path):
    source = tmp_path / "blocks.jsonl"
    write_jsonl(source, [f"Words: ball, sad\nStory:\nTom {number} ran.\n" for number in range(40)])
    options = {"loss_on": "story", "packing": "document", "streaming_chunk_tokens": EVERYTHING}
    data = data_args(tmp_path, source, **options)
    _, stream = open_prepared(data)
    files = open_files(data)
    for step in range(10):
        assert_equal(stream.batch(step, 4), files.batch(step, 4))
    assert (stream.batch(10, 4).labels == -100).any()
    stream.close()
    _, stream = open_prepared(replace(data, streaming_chunk_tokens=SOME))
    for step in range(30):  # a batch of two chunks
        batch = stream.batch(step, 4)
        assert (batch.labels == -100).any() and batch.labels.shape == batch.input_ids.shape
    stream.close()


def test_stream_holds_two_chunks_and_reads_one_ahead(tmp_path, monkeypatch):
    num_read = 0
    read = LocalSource.open_splits

    def counted(self, *args):
        def stories(split):
            nonlocal num_read
            for story in split():
                num_read += 1
                yield story

        return {name: lambda split=split: stories(split) for name, split in read(self, *args).items()}

    data = data_args(tmp_path, jsonl_gz(tmp_path / "source"), validation_fraction=0.01)
    open_prepared(data)
    monkeypatch.setattr(LocalSource, "open_splits", counted)
    _, stream = open_prepared(data)
    assert num_read == 0  # nothing is read before the first batch
    most = 0
    for step in range(40):
        stream.batch(step, 4)
        stream._read_ahead._thread.join()
        if num_read > 110:  # the next epoch is near
            break
        ids = sum(len(one.chunk.ids) for one in stream._chunks)
        most = max(most, num_read - stream._chunks[0].chunk.start.num_read)
        assert len(stream._chunks) <= 2 and ids <= 2 * (SOME + 4 * 60)
    assert step > 10 and 30 < most < 80  # of three chunks, of 120 stories
    stream.close()


def test_sample_on_the_disk_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_stories, "STREAMING_SAMPLE", 10)
    data = data_args(tmp_path, parquet_folder(tmp_path / "source"))
    write_parquet(tmp_path / "source" / "validation-0.parquet", STORIES[:15])
    manifest, stream = open_prepared(data)
    assert [counts["num_stories"] for counts in manifest.splits.values()] == [10, 10]
    assert manifest.provenance.streaming and manifest.provenance.max_stories is None
    assert stories_of(stream, data, epochs=1) == [STORIES]
    held_out = replace(data, validation_split="holdout", validation_fraction=0.5)
    manifest, stream = open_prepared(replace(held_out, data_dir=tmp_path / "other"))
    counts = [counts["num_stories"] for counts in manifest.splits.values()]
    assert sum(counts) == 10 and min(counts) > 1
    validation = set(iter_raw_stories(tmp_path / "other", "validation"))
    [read] = stories_of(stream, replace(data, data_dir=tmp_path / "other"), epochs=1)
    assert not validation & set(read) and 40 < len(read) < 80


def test_other_options_build_the_files_again(tmp_path, caplog):
    data = data_args(tmp_path, parquet_folder(tmp_path / "source"))
    ensure_prepared(data, SMALL)
    caplog.set_level("WARNING")
    ensure_prepared(replace(data, streaming=False), SMALL)
    assert "data.streaming is True (configured: False)" in caplog.text


def test_reader_ends_with_the_stream(tmp_path):
    before = threading.active_count()
    _, stream = open_prepared(data_args(tmp_path, parquet_folder(tmp_path / "source")))
    stream.batch(0, 4)
    stream.close()
    stream.close()
    assert threading.active_count() == before


def test_fault_ends_the_stream_after_the_stories_before_it(tmp_path):
    folder = parquet_folder(tmp_path / "source")
    data = data_args(tmp_path, folder)
    manifest, stream = open_prepared(data)
    (folder / "train-1.parquet").write_bytes(b"PAR1 broken PAR1")
    with pytest.raises(StreamError, match=r"train-1\.parquet cannot be read as parquet") as error:
        for step in range(100):
            stream.batch(step, 4)
    assert step > 3 and "\n" not in str(error.value)
    position = stream.stream_position(step, 4)
    for _ in range(2):
        with pytest.raises(StreamError, match=r"train-1\.parquet"):
            stream.batch(step, 4)
    stream.close()
    # The repaired file: the stream continues there.
    write_parquet(folder / "train-1.parquet", STORIES[40:80])
    resumed, whole = (open_stream(data, manifest, seed=3, position=start) for start in (position, None))
    batches = [whole.batch(number, 4) for number in range(step + 3)]
    for number in range(step, step + 3):
        assert_equal(resumed.batch(number, 4), batches[number])
    resumed.close(), whole.close()


def bad_text(folder: Path) -> Path:
    text_folder(folder)
    (folder / "part-0a.txt").write_bytes(
        b"One story.<|endoftext|>\nTom saw a fox at d\xe9j\xe0.<|endoftext|>"
    )
    return folder


def short_validation(folder: Path) -> Path:
    write_parquet(folder / "train.parquet", STORIES)
    write_parquet(folder / "validation.parquet", [])
    return folder


def one_short_story(folder: Path) -> Path:
    write_parquet(folder / "train.parquet", ["Hi."])
    write_parquet(folder / "validation.parquet", ["Hi."])
    return folder


@pytest.mark.parametrize(
    "write, message",
    [
        (bad_text, r"part-0a\.txt is not valid UTF-8 at byte 42 \(0xe9\)"),
        (short_validation, r"has no validation stories"),
        (one_short_story, r"data\.seq_len \(16\) is longer than the \d training tokens"),
        (lambda folder: folder / "nothing.txt", r"nothing\.txt.* does not exist"),
    ],
)
def test_bad_input_is_rejected_before_the_run(tmp_path, write: Callable[[Path], Path], message):
    with pytest.raises(UserError, match=message) as error:
        open_prepared(data_args(tmp_path, write(tmp_path / "source")))
    assert "\n" not in str(error.value)


def test_stream_shorter_than_a_batch_has_several_epochs_in_one(tmp_path):
    source = tmp_path / "source"
    for split in ("train", "validation"):
        write_parquet(source / f"{split}.parquet", STORIES[:2])
    data = data_args(tmp_path, source)
    _, stream = open_prepared(data)
    files = open_files(data)
    assert_equal(stream.batch(0, 32), files.batch(0, 32))
    stream.close()


def test_deduplication_is_rejected(tmp_path):
    data = data_args(tmp_path, "builtin", deduplicate=True)
    [problem] = data.problems()
    assert problem.startswith("data.deduplicate (true): compares all stories")
    assert data_args(tmp_path, "tinystories").problems() == []  # which is deduplicated otherwise


# The Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, hub_connection(hub, tmp_path / "cache"):
        yield hub


def requested_files(hub: LoopbackHub) -> list[str]:
    return [
        path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path
    ]


@pytest.mark.parametrize("write", [parquet_folder, text_folder])
def test_hub_dataset_is_read_without_a_copy(hub, tmp_path, write):
    folder = write(tmp_path / "source")
    commit = publish_folder(hub, folder, "someone/stories")
    data = data_args(tmp_path, "someone/stories")
    manifest, stream = open_prepared(data)
    assert manifest.provenance.revision == commit
    on_disk = data_args(tmp_path, folder)
    _, expected = open_prepared(replace(on_disk, data_dir=tmp_path / "disk"))
    for step in range(25):
        assert_equal(stream.batch(step, 4), expected.batch(step, 4))
    position = stream.stream_position(25, 4)
    stream.close(), expected.close()
    cache = tmp_path / "cache"
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix in (".parquet", ".txt")]
    # A resumed run starts with the file of its position.
    hub.requests.clear()
    _, resumed = open_prepared(data, position=position)
    resumed.batch(25, 4)
    resumed.close()
    names = sorted(path.name for path in folder.iterdir() if "validation" not in path.name)
    first = position["stories"]["parts"][0]["file"]
    assert first > 0 and requested_files(hub)[0] == names[first]


def test_named_set_is_streamed_at_its_commit(hub, tmp_path):
    publish_tinystories(hub)
    data = data_args(tmp_path, "tinystories", cleaning=False)
    manifest, stream = open_prepared(data)
    files = open_files(replace(data, deduplicate=False))
    del files
    assert stories_of(stream, data, epochs=1) == [list(iter_raw_stories(tmp_path / "whole", "train"))]
    assert manifest.provenance.streaming


def test_dataset_that_only_datasets_reads_is_streamed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    (folder := tmp_path / "source").mkdir()
    for number, first in enumerate((0, 60)):
        with ArrowWriter(path=str(folder / f"train-{number}.arrow")) as writer:
            for story in STORIES[first : first + 60]:
                writer.write({"text": story})
            writer.finalize()
    publish_folder(hub, folder, "someone/stories")
    data = data_args(tmp_path, "someone/stories")
    _, stream = open_prepared(data)
    held_out = set(iter_raw_stories(tmp_path / "data", "validation"))
    expected = [story for story in STORIES if story not in held_out]
    assert stories_of(stream, data, epochs=2) == [expected, expected]
    batches = [stream.batch(step, 4) for step in range(20)]
    position = stream.stream_position(20, 4)
    batches += [stream.batch(step, 4) for step in range(20, 25)]
    stream.close()
    assert position["stories"]["parts"][0]["file"] == 1  # the second shard
    _, resumed = open_prepared(data, position=position)
    for step in range(20, 25):
        assert_equal(resumed.batch(step, 4), batches[step])
    resumed.close()


def test_lost_connection_is_repeated_and_then_ends_the_stream(hub, tmp_path):
    publish_folder(hub, parquet_folder(tmp_path / "source"), "someone/stories")
    data = data_args(tmp_path, "someone/stories")
    manifest, stream = open_prepared(data)
    hub.faults = [Fault("GET", r"resolve/.*/train-1\.parquet", "no_response", times=2)]
    for step in range(40):
        stream.batch(step, 4)
    assert hub.faults[0].times == 0
    stream.close()
    hub.faults = [Fault("GET", r"resolve/.*/train-1\.parquet", 503)]
    stream = open_stream(data, manifest, seed=3)
    with pytest.raises(StreamError, match=r"@\w+/train-1\.parquet cannot be read from the Hub") as error:
        for step in range(40):
            stream.batch(step, 4)
    assert step > 3 and "\n" not in str(error.value)
    stream.close()


def test_unknown_hub_id_is_rejected(hub, tmp_path):
    with pytest.raises(UserError, match=r"data\.source \(no/stories\) is neither an existing path"):
        open_prepared(data_args(tmp_path, "no/stories"))
    assert not (tmp_path / "data" / "raw").exists()
