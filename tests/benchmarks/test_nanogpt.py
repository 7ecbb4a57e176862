"""nanoGPT's weights in our model compute the same function, written here from its README and file."""

import json
import pickle

import numpy as np
import pytest
import torch
from harness import Line, ProcessResult
from nanogpt import from_state_dict, read_iterations, write_data
from random_tokens import write_random_tokens
from torch.nn import functional as F

ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": False, "vocab_size": 50}


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    C, shapes = ARGS["n_embd"], {}
    for layer in range(ARGS["n_layer"]):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.ln_1.weight": (C,), f"{block}.ln_2.weight": (C,)}
        shapes |= {f"{block}.attn.c_attn.weight": (3 * C, C), f"{block}.attn.c_proj.weight": (C, C)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * C, C), f"{block}.mlp.c_proj.weight": (C, 4 * C)}
    shapes |= {"transformer.wte.weight": (50, C), "transformer.wpe.weight": (24, C)}
    shapes |= {"transformer.ln_f.weight": (C,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def nanogpt_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    def norm(x, name):
        return F.layer_norm(x, (32,), weights[f"transformer.{name}.weight"], eps=1e-5)

    def linear(x, name):
        return x @ weights[f"transformer.{name}.weight"].T

    B, T = ids.shape
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:T]
    for layer in range(ARGS["n_layer"]):
        parts = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(32, dim=2)
        q, k, v = (part.view(B, T, 4, 8).transpose(1, 2) for part in parts)
        scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(T, T, dtype=bool).tril(), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, 32)
        x = x + linear(attended, f"h.{layer}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"))
        x = x + linear(inner, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["transformer.wte.weight"].T


@torch.no_grad()
def test_nanogpt_weights_give_nanogpt_logits():
    weights, ids = state_dict(), torch.randint(50, (3, 24))
    expected = nanogpt_logits(weights, ids)
    ours = from_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, ARGS)
    assert (ours(ids).logits - expected).abs().max() < 1e-4
    assert expected.std() > 0.5  # nearly equal logits would hide a difference
    with pytest.raises(ValueError, match="--bias=False"):
        from_state_dict(weights, ARGS | {"bias": True})


def test_nanogpt_data_are_our_tokens(tmp_path):
    write_random_tokens(tmp_path / "ours", vocab_size=300, num_tokens=2000)
    folder = write_data(tmp_path / "ours", tmp_path / "theirs")
    ours = np.fromfile(tmp_path / "ours" / "train.bin", dtype="<u2")
    assert np.array_equal(np.fromfile(folder / "train.bin", dtype=np.uint16), ours)
    assert (folder / "val.bin").stat().st_size == (tmp_path / "ours" / "validation.bin").stat().st_size
    assert pickle.loads((folder / "meta.pkl").read_bytes()) == {"vocab_size": 300}
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert len(ours) == manifest["splits"]["train"]["num_tokens"] == 2000
    assert ours.max() < 300 and np.bincount(ours)[1] > 5 * np.bincount(ours, minlength=300)[50]


def test_nanogpt_lines_are_parsed():
    lines = ["number of parameters: 8.86M", "iter 0: loss 9.2103, time 1500.25ms, mfu -100.00%"]
    lines += ["iter 1: loss nan, time 20.00ms, mfu 3.00%"]
    found = read_iterations(ProcessResult([Line(text, second) for second, text in enumerate(lines)], 3.0, 1))
    assert [(one.number, one.step_seconds, one.at_seconds) for one in found] == [
        (0, 1.50025, 1),
        (1, 0.02, 2),
    ]
    assert found[0].loss == 9.2103 and found[1].loss != found[1].loss
