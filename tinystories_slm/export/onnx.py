"""Export format `onnx`: float32 and int8 graphs with a KV cache, for onnxruntime and the browser."""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import onnx_ir
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch.export import Dim
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import OnnxConfig, OnnxExporter

from tinystories_slm.export.browser import write_page
from tinystories_slm.export.checks import EquivalenceCheck
from tinystories_slm.export.native import export_native
from tinystories_slm.export.onnx_session import compare_float32, compare_int8
from tinystories_slm.model import CACHE_NAME, TinyStoriesForCausalLM

FLOAT32 = "onnx/model.onnx"
INT8 = "onnx/model_quantized.onnx"
"""Paths where transformers.js and optimum expect the two graphs."""


def export_onnx(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, *, vendor: bool = False
) -> list[EquivalenceCheck]:
    """Write both graphs to `folder`, with configuration, tokenizer and the page that runs them in a browser.

    The configuration is that of `native` (llama, qwen3, gpt2), as transformers.js and optimum support no
    other. With `vendor` the folder also contains the page's libraries, so nothing is loaded from elsewhere.

    Raises:
        ExportError: a graph in onnxruntime differs in logits (in float32 by more than 1e-4, in one pass,
            step by step through the cache, or after left padding) or in greedy text.
        UserError: `vendor` is set and npm is missing or fails.
    """
    checks = export_native(model, tokenizer, folder)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for weights in folder.glob(
        "*.safetensors*"
    ):  # the graphs contain them, and the download should stay small
        weights.unlink()

    float32, int8 = folder / FLOAT32, folder / INT8
    float32.parent.mkdir()
    with _suppress_tracing_output():
        onnx_ir.save(_trace_graph(native), float32)
        # Matrices are quantized per column, the embedding as a whole; the tied head reads the same copy.
        quantize_dynamic(float32, int8, per_channel=True, weight_type=QuantType.QInt8)
    checks.append(compare_float32(model, float32, tokenizer))
    checks.append(compare_int8(model, int8, tokenizer))
    write_page(folder, vendor=vendor)
    return checks


def _trace_graph(native: PreTrainedModel) -> onnx_ir.Model:
    """Trace `native` with the exporter of transformers, then rename inputs and outputs for transformers.js.

    Inputs: input_ids, position_ids (B, T), attention_mask (B, S), past_key_values.N.key, .value
    (B, H, S - T, D); outputs: logits (B, T, V), present.N.key, .value (B, H, S, D). B, T and S are dynamic.
    optimum expects the same names.
    """
    layers = native.config.num_hidden_layers
    heads = getattr(native.config, "num_key_value_heads", None) or native.config.num_attention_heads
    head_dim = (
        getattr(native.config, "head_dim", None)
        or native.config.hidden_size // native.config.num_attention_heads
    )
    batch, past, new = 2, 3, 5  # all different and none of them 1, which tracing would turn into a constant
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*torch.randn(2, batch, heads, past, head_dim), layer)
    inputs = {
        "input_ids": torch.zeros(batch, new, dtype=torch.long),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new).expand(batch, -1),
        CACHE_NAME: cache,
    }
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {name: dynamic for name in inputs} | {
        CACHE_NAME: [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in range(2 * layers)]
    }
    program = OnnxExporter().export(native, inputs, config=OnnxConfig(dynamic_shapes=shapes)).program

    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = _rename_io(value.name)
        value.shape = onnx_ir.Shape(_symbolic_shape(value.name, value.shape))
    for node in program.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: half a megabyte, and local paths
    return program


def _rename_io(name: str) -> str:
    """Rename `input.cache.layers.0.keys` to `past_key_values.0.key`, and `output...` to `present.0.key`."""
    match = re.fullmatch(rf"(input|output)\.{CACHE_NAME}\.layers\.(\d+)\.(key|value)s", name)
    if not match:
        return name
    return f"{'past_key_values' if match[1] == 'input' else 'present'}.{match[2]}.{match[3]}"


def _symbolic_shape(name: str, traced: onnx_ir.Shape) -> list[int | str]:
    """Return the shape with names for the dynamic axes, which tracing numbers."""
    if name.startswith(("past_key_values.", "present.")):
        length = "past_sequence_length" if name.startswith("past") else "total_sequence_length"
        return ["batch_size", traced[1], length, traced[3]]
    length = "total_sequence_length" if name == "attention_mask" else "sequence_length"
    return ["batch_size", length, *traced[2:]]


@contextmanager
def _suppress_tracing_output() -> Iterator[None]:
    """Suppress the progress output of tracing and its warnings about unused operators; errors still raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
