from importlib import import_module

import numpy as np

benchmark = import_module("data")  # the linter takes it for the folder of prepared data, if there is one


def test_quick_benchmark_compares_ids_and_speeds(capsys):
    benchmark.main(["--quick"])
    rows = [
        line.strip("| ").split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert [row[0] for row in rows[1:]][:3] == [
        benchmark.OURS,
        "`encode_batch_fast` of tokenizers",
        "`datasets.map` with the tokenizer",
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[1:])


def test_end_tokens_split_the_ids_of_stories():
    assert benchmark._to_lists(np.array([5, 6, 0, 0, 7, 0])) == [[5, 6], [], [7]]
