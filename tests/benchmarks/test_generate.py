import struct

from generate import (
    GPT2_MANY,
    GPT2_ONE,
    LLAMA2C,
    LLAMA2C_INT8,
    _ratios,
    _write_llama2c_int8_weights,
    _write_llama2c_weights,
    main,
)
from harness import Stats


def test_quick_benchmark_prints_every_row(capsys):
    main(["--quick", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "llama2.c is omitted" in out
    rows = [line for line in out.splitlines() if line.startswith(("| ours", "| GPT2"))]
    assert len(rows) == 11 and all(float(row.split(" | ")[1].replace(",", "")) > 0 for row in rows)


def test_ratios_pair_equal_numbers_of_stories():
    names = (
        *(GPT2_ONE, GPT2_MANY, LLAMA2C, "ours, gpt2, 1 story", "ours, gpt2, 256 stories, sampled"),
        *(LLAMA2C_INT8, "ours, llama, int8, 1 story"),
    )
    speeds = {name: Stats.of([10.0 * (at + 1)] * 2) for at, name in enumerate(names)}
    ratios = {name: ratio.median for name, ratio in _ratios(speeds).items()}
    assert ratios == {
        f"ours, gpt2, 1 story / {GPT2_ONE}": 4.0,
        f"ours, gpt2, 1 story / {LLAMA2C}": 1.333,
        f"ours, gpt2, 256 stories, sampled / {GPT2_MANY}": 2.5,
        f"ours, llama, int8, 1 story / {GPT2_ONE}": 7.0,
        f"ours, llama, int8, 1 story / {LLAMA2C_INT8}": 1.167,
    }


def test_llama2c_weights_have_the_shape_of_ours(tmp_path):
    _write_llama2c_weights(tmp_path / "model.bin")
    content = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack("7i", content[:28]) == (256, 704, 8, 8, 8, 10_000, 256)
    ours = 10_000 * 256 + 8 * (4 * 256 * 256 + 3 * 256 * 704 + 2 * 256) + 256
    assert len(content) == 28 + 4 * (ours + 2 * 256 * 16)


def test_llama2c_int8_weights_have_a_scale_for_64_of_them(tmp_path):
    _write_llama2c_int8_weights(tmp_path / "model.bin")
    content = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack("<Ii7iBi", content[:41]) == (0x616B3432, 2, 256, 704, 8, 8, 8, 10_000, 256, 1, 64)
    matrices = 10_000 * 256 + 8 * (4 * 256 * 256 + 3 * 256 * 704)
    assert len(content) == 256 + 4 * 17 * 256 + matrices + 4 * matrices // 64
