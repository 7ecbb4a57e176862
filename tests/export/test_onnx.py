import json
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT

from tinystories_slm.export import ExportError
from tinystories_slm.export.onnx_session import OnnxSession, compare_float32
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM

pytest.importorskip("transformers.exporters", reason="the onnx format needs transformers 5.23")

# Qwen3 is the family of the quickstart, which test_browser.py exports.
FAMILIES = ("gpt2 with biases", "llama, grouped queries")


@pytest.fixture(params=FAMILIES)
def folder(request, exported) -> Path:
    return exported(request.param, "onnx")


@pytest.fixture
def model(folder, request, original) -> TinyStoriesForCausalLM:
    return original(request.node.callspec.params["folder"])


def test_graph_continues_from_its_cache_after_left_padding(model, folder):
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


def test_folder_has_the_files_of_transformers_js_and_no_local_paths(model, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("gpt2" if model.config.family == "gpt2" else "llama")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "export.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "index.html",
        "generate.js",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
    }
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    for path in folder.rglob("*.onnx"):
        local = (b"site-packages", str(ROOT).encode(), str(folder).encode())
        assert not any(word in path.read_bytes() for word in local)


def test_graph_stores_each_matrix_once_and_int8_in_one_byte(model, folder):
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    stored = {}
    for name in ("model", "model_quantized"):
        graph = onnx.load(folder / "onnx" / f"{name}.onnx").graph
        stored[name] = [(prod(t.dims), t.data_type) for t in graph.initializer if len(t.dims) == 2]
    float32 = onnx.TensorProto.FLOAT
    assert sum(size for size, _ in stored["model"]) == matrices
    assert {kind for _, kind in stored["model"]} == {float32}
    learned_positions = 48 * 32 if model.config.family == "gpt2" else 0
    assert sum(size for size, _ in stored["model_quantized"]) == matrices
    assert sum(size for size, kind in stored["model_quantized"] if kind == float32) <= learned_positions


def test_manifest_has_the_error_of_int8(folder):
    *_, float32, int8 = json.loads((folder / "export.json").read_text())["checks"]
    assert (
        float32["name"] == "onnx, float32" and float32["max_difference"] <= 1e-4 and float32["greedy_match"]
    )
    assert int8["name"] == "onnx, int8"
    assert 1e-3 < int8["max_difference"] < 2.0
    assert int8["token_agreement"] > 0.8


def test_compare_float32_rejects_other_logits(model, folder, story_tokenizer):
    graph = folder / "onnx" / "model.onnx"
    compare_float32(model, graph, story_tokenizer)
    norm = model.model.norm.weight
    with torch.no_grad():
        norm[0] += 1e-3
        with pytest.raises(ExportError, match=r"onnx, float32: largest logits difference 0\.0"):
            compare_float32(model, graph, story_tokenizer)
        norm[0] -= 1e-3


@pytest.mark.parametrize("fault", ["cache", "mask"])
def test_compare_float32_rejects_faults_in_decoding(model, folder, story_tokenizer, monkeypatch, fault):
    correct_call = OnnxSession.__call__

    def faulty_call(self, input_ids, mask, cache=None):
        if fault == "cache" and cache is not None:
            cache = {name: value[:, ::-1] for name, value in cache.items()}  # the heads in another order
        if fault == "mask":
            mask = np.ones_like(mask)
        return correct_call(self, input_ids, mask, cache)

    monkeypatch.setattr(OnnxSession, "__call__", faulty_call)
    with pytest.raises(ExportError, match="onnx, float32"):
        compare_float32(model, folder / "onnx" / "model.onnx", story_tokenizer)
