"""torchao, CTranslate2, MLX and torch.compile: each line of docs/tools.md."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny_model
from tool_folders import INSTALL, TEXT, assert_close, every_family, every_format, load, text_ids
from transformers import AutoTokenizer

from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.export import ExportArgs, export
from tinystories_slm.model_folder import save_model_folder


@every_family
@every_format
@torch.no_grad()
def test_torchao_int8_leaves_the_layers_of_native_gpt2(family, format, published, model_of):
    pytest.importorskip("torchao", reason=INSTALL)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.utils import TorchAOBaseTensor

    model = load(published(family, format), format)
    layers = [part for part in model.modules() if type(part).__name__ in ("Linear", "Conv1D")]
    quantize_(model, Int8WeightOnlyConfig())

    num_quantized = sum(isinstance(layer.weight, TorchAOBaseTensor) for layer in layers)
    if family == "gpt2" and format != "custom":
        assert (num_quantized, len(layers)) == (1, 9)  # the head alone: GPT-2's other layers are Conv1D
    else:
        assert num_quantized == len(layers) == (13 if family == "gpt2" else 15)
    ids = text_ids(published(family, format))
    expected = model_of(family)(ids).logits
    difference = (model(ids).logits - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.05  # measured: 0.006 to 0.027


@every_family
def test_ctranslate2_converts_native(family, published, model_of, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason=INSTALL)
    native = published(family, "native")
    ctranslate2.converters.TransformersConverter(str(native)).convert(str(tmp_path / "ctranslate2"))
    generator = ctranslate2.Generator(str(tmp_path / "ctranslate2"))

    ids = text_ids(native)
    tokens = AutoTokenizer.from_pretrained(native).convert_ids_to_tokens(ids[0])
    logits = torch.from_numpy(np.array(generator.forward_batch([tokens])))
    assert_close(logits, model_of(family)(ids).logits)
    [result] = generator.generate_batch([tokens], max_length=10, include_prompt_in_result=False)
    greedy = model_of(family).generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert result.sequences_ids[0] == greedy.tolist()
    for format, message in (("custom", "No conversion is registered"), ("gguf", "Unrecognized model")):
        converter = ctranslate2.converters.TransformersConverter(
            str(published(family, format)), trust_remote_code=True
        )
        with pytest.raises(ValueError, match=message):
            converter.convert(str(tmp_path / format))


# In a process of its own: `import mlx` aborts after the imports of the other tools.
MLX_PROGRAM = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
print(json.dumps(model(mx.array(json.loads(sys.argv[2]))).tolist()))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_reads_native_llama_and_qwen3(family, tmp_path):
    """MLX for Linux is `mlx[cpu]`."""
    if find_spec("mlx_lm") is None:
        pytest.skip("pip install 'mlx[cpu]' mlx-lm")
    tokenizer = train_story_tokenizer([TEXT] * 5, 272)
    model = tiny_model(vocab_size=272, pad_token_id=tokenizer.pad_token_id, **FAMILIES[family])
    save_model_folder(model, tokenizer, tmp_path / "best")
    folder = export(ExportArgs(model=str(tmp_path / "best"), format="native", output=tmp_path / "native"))
    ids = torch.randint(0, 272, (2, 40), generator=torch.Generator().manual_seed(1))
    command = [sys.executable, "-c", MLX_PROGRAM, folder, json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True)
    if "gpt2" in family:
        assert done.returncode == 1 and "n_ctx" in done.stderr  # nor does it know the names of the weights
        return
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert_close(torch.tensor(json.loads(done.stdout)), model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_custom_compiles_without_a_graph_break_and_generates_the_same(family):
    """`torch.compile` with a static cache, as in `generate`; the backend `eager` checks the graphs alone."""
    model = tiny_model(vocab_size=101, pad_token_id=1, **FAMILIES[family])
    ids = torch.tensor([[0, 5, 7, 9, 11], [1, 1, 0, 20, 30]])
    options = {"attention_mask": (ids != 1).long(), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the prompt, one token


@pytest.mark.weekly
@pytest.mark.compiler
def test_custom_compiled_by_inductor_generates_the_same():
    model = tiny_model(vocab_size=101, pad_token_id=1, **FAMILIES["llama, qk_norm, untied"])
    ids = torch.tensor([[0, 5, 7, 9, 11]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
