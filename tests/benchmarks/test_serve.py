"""The benchmark of the servers, with few tokens of a small model."""

import pytest
import serve
from conftest import tiny_model
from harness import Stats

from tinystories_slm.model_folder import save_model_folder


@pytest.mark.weekly
def test_quick_benchmark_measures_each_server(tokenizer, tmp_path, capsys):
    """Three servers in processes of their own."""
    pytest.importorskip("fastapi", reason="pip install 'tinystories_slm[serve]'")
    # The native form has a padding token of its own, as models that are trained here.
    folder = save_model_folder(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "best")
    few = ["--users", "2", "--rounds=1", "--requests_per_user=1", "--max_tokens=8"]
    serve.main(["--quick", f"--model={folder}", *few, "--cb_max_memory_percent=0.02"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 ")]
    assert [row[1] for row in rows] == [serve.OURS, serve.PLAIN, serve.BATCHED]
    assert all(float(row[2].replace(",", "")) > 0 and float(row[5]) > 0 for row in rows)
    assert rows[0][6].rstrip(" |") == "0"


def test_summary_has_the_statistics_of_the_rounds():
    rounds = [serve.Measured(100.0, [0.1, 0.4, 0.2], 3_000_000, 0), serve.Measured(200.0, [], 5_000_000, 3)]
    assert serve._summary(rounds) == {
        "tokens_per_second": Stats.of([100.0, 200.0]),
        "first_word_median_s": Stats.of([0.2, 0.0]),
        "first_word_max_s": Stats.of([0.4, 0.0]),
        "peak_megabytes": Stats.of([3.0, 5.0]),
        "failed_requests": 3,
    }
    cells = serve._format_table({(serve.OURS, 8): rounds}).splitlines()[2].strip("| ").split(" | ")
    assert cells[:4] == ["8", "ours", "150 (100 to 200)", "0.100 (0.000 to 0.200)"]
    assert cells[4:] == ["0.200 (0.000 to 0.400)", "4 (3 to 5)", "3"]


def test_requests_of_users_differ():
    bodies = [serve._body("m", user, number, 5) for user in range(50) for number in range(3)]
    assert len({body["seed"] for body in bodies}) == 150
    assert len({body["prompt"] for body in bodies}) == len(serve.PROMPTS)
