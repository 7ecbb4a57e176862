import struct

from generate import GPT2_MANY, GPT2_ONE, LLAMA2C, _ratios, _write_llama2c_weights, main
from measuring import Spread


def test_all_of_it_runs(capsys):
    main(["--quick", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "llama2.c is left out" in out
    rows = [line for line in out.splitlines() if line.startswith(("| ours", "| GPT2"))]
    assert len(rows) == 10 and all(float(row.split(" | ")[1].replace(",", "")) > 0 for row in rows)


def test_each_is_held_against_the_peer_of_its_number_of_stories():
    names = (GPT2_ONE, GPT2_MANY, LLAMA2C, "ours, gpt, 1 story", "ours, gpt, 256 stories, sampled")
    speeds = {name: Spread.of([10.0 * (at + 1)] * 2) for at, name in enumerate(names)}
    ratios = {name: ratio.median for name, ratio in _ratios(speeds).items()}
    assert ratios == {
        f"ours, gpt, 1 story / {GPT2_ONE}": 4.0,
        f"ours, gpt, 1 story / {LLAMA2C}": 1.333,
        f"ours, gpt, 256 stories, sampled / {GPT2_MANY}": 2.5,
    }


def test_llama2c_gets_a_model_of_our_size(tmp_path):
    _write_llama2c_weights(tmp_path / "model.bin")
    content = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack("7i", content[:28]) == (256, 704, 8, 8, 8, 10_000, 256)
    ours = 10_000 * 256 + 8 * (4 * 256 * 256 + 3 * 256 * 704 + 2 * 256) + 256
    assert len(content) == 28 + 4 * (ours + 2 * 256 * 16)
