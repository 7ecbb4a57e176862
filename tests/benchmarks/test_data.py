from importlib import import_module

import numpy as np
import pytest

benchmark = import_module("data")  # the linter takes it for the folder of prepared data, if there is one


def test_quick_benchmark_compares_ids_and_speeds(capsys):
    benchmark.main(["--quick"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows, training = ([line.strip("| ").split(" | ") for line in part] for part in (lines[:-3], lines[-3:]))
    assert [row[0] for row in rows[1:]][:3] == [
        benchmark.OURS,
        "`encode_batch_fast` of tokenizers",
        "`datasets.map` with the tokenizer",
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[1:])
    assert [row[0] for row in training] == ["stories", "these, 200 (0 MB)", "the grammar's, 300 (0 MB)"]


def test_end_tokens_split_the_ids_of_stories():
    assert benchmark._to_lists(np.array([5, 6, 0, 0, 7, 0])) == [[5, 6], [], [7]]


def test_trainers_with_other_tokenizers_are_rejected(monkeypatch):
    train = benchmark.train_bpe
    monkeypatch.setattr(benchmark, "train_with_library", lambda stories, _: train(stories, 258))
    with pytest.raises(ValueError, match="the tokenizers differ"):
        benchmark.main(["--quick", "--only", "training"])
