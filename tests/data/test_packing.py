"""PackedDataset: tokens and order of the windows, and memory use."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories_slm.data.packing import (
    IGNORED_LABEL,
    PACKINGS,
    BestFitPacking,
    ContiguousPacking,
    DocumentPacking,
    PackedDataset,
    iter_documents,
)
from tinystories_slm.data.packing.best_fit import pack_best_fit
from tinystories_slm.data.packing.permutation import permute
from tinystories_slm.errors import UserError


def token_file(path: Path, tokens: list[int] | range | np.ndarray, dtype: str = "<u2") -> Path:
    np.asarray(tokens, dtype=dtype).tofile(path)
    return path


def open_dataset(path: Path, seq_len: int, seed: int = 0, token_dtype: str = "uint16") -> PackedDataset:
    return ContiguousPacking(path, token_dtype=token_dtype, seq_len=seq_len, seed=seed, eos_token_id=0)


def test_windows_of_twelve_tokens_are_pinned(tmp_path: Path) -> None:
    data = open_dataset(token_file(tmp_path / "train.bin", range(100, 112)), seq_len=5, seed=0)
    assert len(data) == 3
    batches = [data.batch(step, 3).input_ids.tolist() for step in range(3)]
    # Version 2 of the order: a change here changes the batches of every training run (ORDER_VERSION).
    assert batches == [
        [[101, 102, 103, 104, 105], [109, 110, 111, 100, 101], [105, 106, 107, 108, 109]],
        [[104, 105, 106, 107, 108], [108, 109, 110, 111, 100], [100, 101, 102, 103, 104]],
        [[105, 106, 107, 108, 109], [109, 110, 111, 100, 101], [101, 102, 103, 104, 105]],
    ]


def test_batch_from_uint32_is_int64_of_the_requested_shape(tmp_path: Path) -> None:
    path = token_file(tmp_path / "train.bin", [70_000 + i for i in range(64)], "<u4")
    batch = open_dataset(path, seq_len=8, token_dtype="uint32").batch(0, 3).input_ids
    assert batch.shape == (3, 8) and batch.dtype == np.int64
    assert batch.min() >= 70_000 and batch.max() < 70_064


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(8, 300),
    seq_len=st.integers(2, 8),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_contiguous_epoch_predicts_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, seq_len: int, seed: int, epoch: int
) -> None:
    path = token_file(tmp_path_factory.mktemp("tokens") / "train.bin", range(num_tokens))
    data = open_dataset(path, seq_len, seed)
    batch = data.batch(epoch, len(data)).input_ids  # a batch of the size of an epoch
    assert np.all((batch[:, 1:] - batch[:, :-1]) % num_tokens == 1)  # whole windows of the ring
    predicted = batch[:, 1:].ravel().tolist()
    assert set(predicted) == set(range(num_tokens))
    assert len(predicted) - num_tokens <= seq_len - 2  # repeated where the last window meets the first


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000])
def test_permutation_is_one_to_one_and_depends_on_its_key(size: int) -> None:
    numbers = np.arange(size)
    for key in ((0, 0), (0, 1), (7, 2)):
        assert sorted(permute(numbers, size, key).tolist()) == list(range(size))
    orders = {permute(numbers, size, (seed, epoch)).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) >= {1: 1, 2: 2, 3: 5, 4: 8, 5: 14}.get(size, 16)


def test_permutation_is_uniform() -> None:
    # 12,000 keys x 6 places: chi-squared of 25 degrees of freedom, 99.99 % below 58.
    counts = np.zeros((6, 6))
    for key in range(12_000):
        counts[np.arange(6), permute(np.arange(6), 6, (key, 1))] += 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 58
    # Neighbors end up far apart: the mean distance of two random numbers below n is n / 3.
    order = permute(np.arange(10_000), 10_000, (3, 3))
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000 / 3, rel=0.03)


@settings(max_examples=60, deadline=None)
@given(
    step=st.integers(0, 30),
    batch_size=st.integers(1, 40),
    start=st.integers(0, 40),
    stop=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_rows_and_batch_size_slice_one_endless_stream(
    tmp_path_factory: pytest.TempPathFactory, step: int, batch_size: int, start: int, stop: int, seed: int
) -> None:
    path = token_file(tmp_path_factory.mktemp("tokens") / "train.bin", range(103))
    batch = open_dataset(path, 10, seed).batch(step, batch_size).input_ids
    rows = open_dataset(path, 10, seed).batch(step, batch_size, rows=slice(start, stop)).input_ids
    assert rows.tolist() == batch[start:stop].tolist()
    stream = open_dataset(path, 10, seed)
    one_by_one = [stream.batch(step * batch_size + row, 1).input_ids[0].tolist() for row in range(batch_size)]
    assert one_by_one == batch.tolist()


def test_order_and_offset_change_with_epoch_and_seed(tmp_path: Path) -> None:
    path = token_file(tmp_path / "train.bin", range(1000))
    epochs = [
        open_dataset(path, 10, seed).batch(epoch, 112).input_ids for seed in (0, 1) for epoch in range(10)
    ]
    assert len({epoch.tobytes() for epoch in epochs}) == 20
    assert len({int(epoch[0, 0]) % 9 for epoch in epochs}) > 3


def test_file_shorter_than_one_window_is_rejected(tmp_path: Path) -> None:
    data = open_dataset(token_file(tmp_path / "train.bin", range(8)), seq_len=8)
    assert sorted(data.batch(5, 1).input_ids[0].tolist()) == list(range(8))
    with pytest.raises(UserError, match=r"data\.seq_len \(9\) is longer than the 8 tokens"):
        open_dataset(tmp_path / "train.bin", seq_len=9)


@pytest.mark.parametrize("packing", PACKINGS)
def test_positions_restart_with_each_story(tmp_path: Path, packing: str) -> None:
    lengths = np.random.default_rng(0).integers(0, 30, 200)
    tokens = np.concatenate([np.append(np.arange(1, n + 1), 0) for n in lengths])
    path = token_file(tmp_path / "train.bin", tokens)
    options = dict(token_dtype="uint16", seq_len=24, seed=1, eos_token_id=0)
    batch = PACKINGS[packing](path, **options, mask_across_stories=True).batch(0, 200)
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        place = 0
        for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
            place = 0 if i == 0 or token == 0 else place + 1
            assert positions[i] == place
            assert label in (token, IGNORED_LABEL)
    plain = PACKINGS[packing](path, **options).batch(0, 200)
    assert plain.position_ids is None
    assert np.array_equal(plain.input_ids, batch.input_ids)


@pytest.mark.parametrize("packing", PACKINGS)
def test_tokens_of_prompts_are_not_trained_on(tmp_path: Path, packing: str) -> None:
    rng = np.random.default_rng(0)
    prompts, stories = rng.integers(0, 20, 100), rng.integers(0, 30, 100)
    # Tokens 1 are prompts, 2 are stories, 0 is the end of a story.
    tokens = np.concatenate([[1] * p + [2] * n + [0] for p, n in zip(prompts, stories, strict=True)])
    path = token_file(tmp_path / "train.bin", tokens)
    options = dict(token_dtype="uint16", seq_len=24, seed=1, eos_token_id=0, prompt_lengths=prompts)
    batch = PACKINGS[packing](path, **options).batch(0, 200)
    trained = batch.labels != IGNORED_LABEL
    assert (batch.input_ids[trained] == batch.labels[trained]).all()
    assert not (trained & (batch.input_ids == 1)).any()
    assert (trained | (batch.input_ids != 2)).all()
    if packing != "best_fit":  # its padding is of end tokens
        assert (trained == (batch.input_ids != 1)).all()


def test_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    data = open_dataset(token_file(tmp_path / "train.bin", range(100)), seq_len=8)
    data.batch(0, 2)
    token_file(tmp_path / "other.bin", range(100)).replace(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train.bin was replaced while this run reads it; resume the run"):
        data.batch(1, 2)


def test_file_with_half_a_token_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"\(3 bytes\): the size must be a multiple of 2 bytes \(uint16\)"):
        open_dataset(tmp_path / "train.bin", seq_len=1)


def test_memory_does_not_grow_with_file_size(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        file.truncate(400 * 10**6)  # sparse: reads as zeros, page by page
    measure = """
import sys
from pathlib import Path
from tinystories_slm.data.packing import ContiguousPacking

def rss_mb():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024

data = ContiguousPacking(Path(sys.argv[1]), token_dtype="uint16", seq_len=1000, seed=0, eos_token_id=0)
data.batch(0, 64)
before = rss_mb()
for step in range(1, 600):
    data.batch(step, 64)
print(rss_mb() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads resident memory from /proc")
    done = subprocess.run(
        [sys.executable, "-c", measure, str(path)], capture_output=True, text=True, check=True, timeout=100
    )
    assert float(done.stdout) < 60


def test_iter_documents_splits_at_the_end_of_text_token() -> None:
    tokens = np.array([5, 6, 0, 7, 0, 8, 9, 9, 0, 4], dtype=np.uint16)
    assert [story.tolist() for story in iter_documents(tokens, 0)] == [[5, 6], [7], [8, 9, 9]]
    assert [story.tolist() for story in iter_documents(tokens, 0, limit=2)] == [[5, 6], [7]]
    assert list(iter_documents(tokens, 0, limit=0)) == []


def test_iter_documents_reads_stories_across_chunks() -> None:
    lengths = [700_000, 700_000, 3, 2**20 - 1, 1]
    tokens = np.concatenate([np.append(np.full(n, n % 60_000 + 1), 0) for n in lengths])
    assert [len(story) for story in iter_documents(tokens, 0)] == lengths


def test_document_windows_start_at_stories_and_continue(tmp_path: Path) -> None:
    # Stories of 2, 7 and 1 tokens, each followed by end-of-text (0); windows of 4 tokens.
    path = token_file(tmp_path / "train.bin", [11, 12, 0, 21, 22, 23, 24, 25, 26, 27, 0, 31, 0])
    data = DocumentPacking(path, token_dtype="uint16", seq_len=4, seed=0, eos_token_id=0)
    with_eos = [
        [0, 11, 12, 0],  # the last end-of-text token of the ring precedes the first story
        [0, 21, 22, 23],
        [23, 24, 25, 26],  # further windows of the long story
        [26, 27, 0, 31],
        [0, 31, 0, 11],
    ]
    without = [[11, 12, 0, 21], [21, 22, 23, 24], [24, 25, 26, 27], [27, 0, 31, 0], [31, 0, 11, 12]]
    seen = set()
    for step in range(120):
        epoch = data.batch(step, len(data)).input_ids.tolist()
        pairs = [next(i for i in range(5) if row in (with_eos[i], without[i])) for row in epoch]
        assert sorted(pairs) == [0, 1, 2, 3, 4]
        seen |= {tuple(row) for row in epoch}
    assert seen == {tuple(row) for row in with_eos + without}


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 16),
    seed=st.integers(0, 5),
)
def test_document_windows_predict_every_token(tmp_path_factory, lengths, seq_len, seed):
    # Every token has a unique id, so a window shows where in the file it was read.
    number = iter(range(1, 10_000))
    tokens = [token for length in lengths for token in [*(next(number) for _ in range(length)), 0]]
    if len(tokens) < seq_len:
        return
    path = token_file(tmp_path_factory.mktemp("tokens") / "train.bin", tokens)
    data = DocumentPacking(path, token_dtype="uint16", seq_len=seq_len, seed=seed, eos_token_id=0)
    assert len(data) == sum(-(-(length + 1) // (seq_len - 1)) for length in lengths)
    predicted = set()
    for step in range(24):  # a window omits its first token in all 24 epochs with probability 8^-24
        predicted |= set(data.batch(step, len(data)).input_ids[:, 1:].ravel().tolist())
    assert set(tokens) <= predicted


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    seq_len=st.integers(2, 16),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_best_fit_epoch_predicts_every_token_exactly_once(tmp_path_factory, lengths, seq_len, seed, epoch):
    number = iter(range(1, 10_000))
    tokens = [token for length in lengths for token in [*(next(number) for _ in range(length)), 0]]
    if len(tokens) < seq_len:
        return
    path = token_file(tmp_path_factory.mktemp("tokens") / "train.bin", tokens)
    data = BestFitPacking(path, token_dtype="uint16", seq_len=seq_len, seed=seed, eos_token_id=0)
    batch = data.batch(epoch, len(data))
    labels = batch.labels[:, 1:]
    assert sorted(labels[labels != IGNORED_LABEL].tolist()) == sorted(tokens)
    assert data.padding_share == pytest.approx((labels == IGNORED_LABEL).mean())
    stories = {int(story[0]): story.tolist() for story in iter_documents(np.array(tokens), 0) if len(story)}
    for ids, row in zip(batch.input_ids, batch.labels, strict=True):
        text = ids[row != IGNORED_LABEL]
        assert text.tolist() == ids[: len(text)].tolist()  # padding is at the end
        for i in np.flatnonzero(ids[:-1] == 0):
            if row[i + 1] > 0:  # a story starts here: it is whole, or fills the rest of the window
                story = stories[int(row[i + 1])]
                assert ids[i + 1 : i + 1 + len(story)].tolist() == story[: seq_len - 1 - i]
                assert len(story) < seq_len - 1 - i or i == 0


def test_best_fit_of_known_lengths() -> None:
    # Bins of 10. The rests of long stories open bins 0 and 1, with room for 3 and 6.
    lengths = np.array([10, 6, 6, 5, 4, 3, 1])
    bins = pack_best_fit(np.array([7, 4]), lengths, 10)
    # 6 fits bin 1 exactly; the other 6 opens bin 3; 5 opens bin 4, where 4 fits worse than in bin 3.
    assert bins.bins.tolist() == [2, 1, 3, 4, 3, 0, 4]
    assert bins.num_bins == 5


@given(
    rests=st.lists(st.integers(1, 20), max_size=20),
    lengths=st.lists(st.integers(1, 20), max_size=200),
)
def test_best_fit_fills_no_bin_over_its_capacity(rests, lengths):
    lengths = np.array(sorted(lengths, reverse=True), dtype=np.int64)
    packed = pack_best_fit(np.array(rests, dtype=np.int64), lengths, 20)
    all_bins = np.concatenate([np.arange(len(rests)), packed.bins])
    used = np.bincount(all_bins, [*rests, *lengths], packed.num_bins)
    assert used.max(initial=0) <= 20
    opened = np.sort(used[len(rests) :])
    assert len(opened) < 2 or opened[:2].sum() > 20  # a piece opens a bin only if no other has room


def test_best_fit_changes_neighbors_with_the_epoch(tmp_path: Path) -> None:
    tokens = np.concatenate([[n, n, n, 0] for n in range(1, 101)])
    path = token_file(tmp_path / "train.bin", tokens)
    data = BestFitPacking(path, token_dtype="uint16", seq_len=9, seed=0, eos_token_id=0)
    assert len(data) == 50 and data.padding_share == 0.0
    pairs = [
        {tuple(sorted((row[1], row[5]))) for row in data.batch(e, 50).input_ids.tolist()} for e in (0, 1)
    ]
    assert len(pairs[0] & pairs[1]) < 10
