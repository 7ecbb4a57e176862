import json
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT

from tinystories_slm import TinyStoriesForCausalLM
from tinystories_slm.export import ExportError
from tinystories_slm.export.onnx_session import OnnxSession, compare_float32

pytest.importorskip("transformers.exporters", reason="the onnx form needs transformers 5.23")

# Qwen3 is the family of the quickstart, which test_browser.py exports.
FAMILIES = ("gpt with biases", "modern, grouped queries")


@pytest.fixture(params=FAMILIES)
def folder(request, exported) -> Path:
    return exported(request.param, "onnx")


@pytest.fixture
def model(folder, request, original) -> TinyStoriesForCausalLM:
    return original(request.node.callspec.params["folder"])


def test_a_graph_reads_on_from_its_cache_behind_left_padding(model, folder):
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    outputs = [output.name for output in session.get_outputs()]
    ids = torch.randint(0, 288, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[2, :1] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask).logits.detach()

    heads, size = model.config.num_key_value_heads, model.config.head_dim
    cache = {
        f"past_key_values.{layer}.{part}": np.zeros((3, heads, 0, size), np.float32)
        for layer in range(2)
        for part in ("key", "value")
    }
    for start, stop in ((0, 9), (9, 10), (10, 15), (15, 24)):
        feed = {
            "input_ids": ids[:, start:stop].numpy(),
            "attention_mask": mask[:, :stop].numpy(),
            "position_ids": positions[:, start:stop].numpy(),
        }
        results = dict(zip(outputs, session.run(None, feed | cache), strict=True))
        logits = torch.from_numpy(results.pop("logits"))
        seen = mask[:, start:stop].bool()
        torch.testing.assert_close(logits[seen], expected[:, start:stop][seen], rtol=0, atol=1e-4)
        cache = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        assert all(value.shape == (3, heads, stop, size) for value in cache.values())
    assert len(cache) == 4


def test_the_folder_is_what_transformers_js_looks_for_and_names_nothing_local(model, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("gpt2" if model.config.family == "gpt" else "llama")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "export.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "index.html",
        "storyteller.js",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
    }
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    for path in folder.rglob("*.onnx"):
        local = (b"site-packages", str(ROOT).encode(), str(folder).encode())
        assert not any(word in path.read_bytes() for word in local)


def test_every_matrix_is_stored_once_and_of_one_byte_in_int8(model, folder):
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    stored = {}
    for name in ("model", "model_quantized"):
        graph = onnx.load(folder / "onnx" / f"{name}.onnx").graph
        stored[name] = [(prod(t.dims), t.data_type) for t in graph.initializer if len(t.dims) == 2]
    float32 = onnx.TensorProto.FLOAT
    assert sum(size for size, _ in stored["model"]) == matrices
    assert {kind for _, kind in stored["model"]} == {float32}
    learned_positions = 48 * 32 if model.config.family == "gpt" else 0
    assert sum(size for size, _ in stored["model_quantized"]) == matrices
    assert sum(size for size, kind in stored["model_quantized"] if kind == float32) <= learned_positions


def test_the_record_says_how_far_int8_is(folder):
    *_, float32, int8 = json.loads((folder / "export.json").read_text())["checks"]
    assert float32["name"] == "onnx, float32" and float32["max_difference"] <= 1e-4 and float32["same_text"]
    assert int8["name"] == "onnx, int8"
    assert 1e-3 < int8["max_difference"] < 2.0
    assert int8["agreement"] > 0.8


def test_a_graph_that_computes_something_else_is_refused(model, folder, story_tokenizer):
    graph = folder / "onnx" / "model.onnx"
    compare_float32(model, graph, story_tokenizer)
    norm = model.model.norm.weight
    with torch.no_grad():
        norm[0] += 1e-3
        with pytest.raises(ExportError, match=r"onnx, float32: largest logits difference 0\.0"):
            compare_float32(model, graph, story_tokenizer)
        norm[0] -= 1e-3


@pytest.mark.parametrize("fault", ["cache", "mask"])
def test_a_fault_that_only_shows_while_telling_is_refused(model, folder, story_tokenizer, monkeypatch, fault):
    right = OnnxSession.__call__

    def wrong(self, input_ids, mask, cache=None):
        if fault == "cache" and cache is not None:
            cache = {name: value[:, ::-1] for name, value in cache.items()}  # heads in another order
        if fault == "mask":
            mask = np.ones_like(mask)
        return right(self, input_ids, mask, cache)

    monkeypatch.setattr(OnnxSession, "__call__", wrong)
    with pytest.raises(ExportError, match="onnx, float32"):
        compare_float32(model, folder / "onnx" / "model.onnx", story_tokenizer)
