"""`onnx`: for onnxruntime and the browser, float32 and int8, both with a key-value cache."""

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
from tinystories_slm.export.checks import Check
from tinystories_slm.export.native import export_native
from tinystories_slm.export.onnx_session import compare_float32, compare_int8
from tinystories_slm.model import CACHE_NAME, TinyStoriesForCausalLM

FLOAT32 = "onnx/model.onnx"
INT8 = "onnx/model_quantized.onnx"
"""Where transformers.js and optimum look for the two."""


def export_onnx(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, *, vendor: bool = False
) -> list[Check]:
    """Fill `folder` with both graphs, what loads them, and the page that tells stories in a browser.

    The configuration is the native one (llama, qwen3, gpt2): transformers.js and optimum know no other.
    With `vendor` the page's libraries come along, and nothing is loaded from elsewhere.

    Raises:
        ExportError: a graph in onnxruntime has other logits (by more than 1e-4 in float32, whole, step by
            step through the cache, or behind padding) or tells another greedy story.
        InputError: `vendor` without npm, or npm cannot reach its registry.
    """
    checks = export_native(model, tokenizer, folder)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for weights in folder.glob("*.safetensors*"):  # they are in the graphs, and the page should stay small
        weights.unlink()

    float32, int8 = folder / FLOAT32, folder / INT8
    float32.parent.mkdir()
    with _quietly():
        onnx_ir.save(_graph(native), float32)
        # Weights of matrices by column, the embedding whole; the head reads the embedding's one copy.
        quantize_dynamic(float32, int8, per_channel=True, weight_type=QuantType.QInt8)
    checks.append(compare_float32(model, float32, tokenizer))
    checks.append(compare_int8(model, int8, tokenizer))
    write_page(folder, vendor=vendor)
    return checks


def _graph(native: PreTrainedModel) -> onnx_ir.Model:
    """Traced by transformers' own exporter, then given the names that transformers.js and optimum expect.

    Inputs: input_ids, position_ids (B, T), attention_mask (B, S), past_key_values.N.key, .value
    (B, H, S - T, D); outputs: logits (B, T, V), present.N.key, .value (B, H, S, D). B, T and S are free.
    """
    layers = native.config.num_hidden_layers
    heads = getattr(native.config, "num_key_value_heads", None) or native.config.num_attention_heads
    head_dim = (
        getattr(native.config, "head_dim", None)
        or native.config.hidden_size // native.config.num_attention_heads
    )
    batch, past, new = 2, 3, 5  # all different, and none of them 1, which tracing would take for a constant
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*torch.randn(2, batch, heads, past, head_dim), layer)
    inputs = {
        "input_ids": torch.zeros(batch, new, dtype=torch.long),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new).expand(batch, -1),
        CACHE_NAME: cache,
    }
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {name: free for name in inputs} | {
        CACHE_NAME: [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in range(2 * layers)]
    }
    program = OnnxExporter().export(native, inputs, config=OnnxConfig(dynamic_shapes=shapes)).program

    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = _name(value.name)
        value.shape = onnx_ir.Shape(_shape(value.name, value.shape))
    for node in program.graph.all_nodes():
        node.metadata_props.clear()  # where in the source it was traced: half a megabyte, and local paths
    return program


def _name(name: str) -> str:
    """`input.cache.layers.0.keys` as `past_key_values.0.key`, `output...` as `present.0.key`."""
    match = re.fullmatch(rf"(input|output)\.{CACHE_NAME}\.layers\.(\d+)\.(key|value)s", name)
    if not match:
        return name
    return f"{'past_key_values' if match[1] == 'input' else 'present'}.{match[2]}.{match[3]}"


def _shape(name: str, traced: onnx_ir.Shape) -> list[int | str]:
    """Names for the free axes, which tracing numbers."""
    if name.startswith(("past_key_values.", "present.")):
        length = "past_sequence_length" if name.startswith("past") else "total_sequence_length"
        return ["batch_size", traced[1], length, traced[3]]
    length = "total_sequence_length" if name == "attention_mask" else "sequence_length"
    return ["batch_size", length, *traced[2:]]


@contextmanager
def _quietly() -> Iterator[None]:
    """Tracing prints its stages and warns of operators that these models have not; faults still raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
