import json
from itertools import islice

import gguf
import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny_model
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from tinystories_slm.errors import UserError
from tinystories_slm.export import ExportArgs, ExportError, export
from tinystories_slm.export import gguf as gguf_export
from tinystories_slm.export.checks import TOKENIZER_TEXTS
from tinystories_slm.gguf_file import read_gguf_facts
from tinystories_slm.model_folder import load_model_folder, save_model_folder

GREEDY = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_file_loads_with_equal_logits_and_ids(family, exported, original, best, input_ids):
    folder, model = exported(family, "gguf", quantization="f32"), original(family)
    kwargs = read_gguf_facts(folder / "model.gguf").options
    exported_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **kwargs).eval()

    assert torch.equal(exported_model(input_ids).logits, model(input_ids).logits)
    assert torch.equal(
        load_model_folder(str(folder / "model.gguf"))[0](input_ids).logits, model(input_ids).logits
    )
    assert exported_model.config.eos_token_id == exported_model.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(best(family))
    gguf_tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in TOKENIZER_TEXTS:
        assert gguf_tokenizer(text).input_ids == tokenizer(text).input_ids, text
        assert gguf_tokenizer.decode(gguf_tokenizer(text).input_ids) == text


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama, qk_norm, untied"])
def test_common_models_load_with_the_file_name_alone(family, exported, original, input_ids):
    folder = exported(family, "gguf", quantization="f32")
    exported_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()

    difference = (exported_model(input_ids).logits - original(family)(input_ids).logits).abs().max().item()
    assert difference <= (1e-5 if family == "gpt2" else 0.0)  # gelu_new sums in another order


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["gpt2 with biases", "llama"])
def test_smaller_types_round_only_the_weights(family, quantization, exported, original, input_ids):
    model = original(family)
    folder = exported(family, "gguf", quantization=quantization)
    kwargs = read_gguf_facts(folder / "model.gguf").options
    exported_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **kwargs).eval()

    difference = (exported_model(input_ids).logits - model(input_ids).logits).abs().max().item()
    assert 0 < difference < {"f16": 0.02, "q8_0": 0.3}[quantization]
    reader = gguf.GGUFReader(folder / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[name] for name in types if "norm" in name or "bias" in name} == {"F32"}
    expected = quantization.upper()
    assert types["token_embd.weight"] == types["blk.1.attn_output.weight"] == expected
    if family == "gpt2 with biases":
        assert types["position_embd.weight"] == "F32"
        assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 48 do not divide into blocks of 32


def test_file_stores_architecture_pre_tokenizer_and_sampling(exported):
    fields = gguf.GGUFReader(exported("llama, grouped queries", "gguf") / "model.gguf").fields
    value = {name: field.contents() for name, field in fields.items() if not name.endswith("tokens")}

    assert value["general.architecture"] == "llama" and value["general.file_type"] == 1
    assert value["llama.attention.head_count_kv"] == 2 and value["llama.rope.freq_base"] == 50_000.0
    assert (value["tokenizer.ggml.model"], value["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert value["tokenizer.ggml.eos_token_id"] == value["tokenizer.ggml.bos_token_id"] == 0
    assert value["tokenizer.ggml.add_bos_token"] is True
    assert value["tokenizer.ggml.token_type"] == [3] + [1] * 287
    assert value["general.sampling.top_k"] == 50
    assert value["general.sampling.temp"] == pytest.approx(0.8)


def test_export_detects_unpermuted_queries_and_keys(best, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "rope_halves_to_pairs", lambda rows, num_heads: rows)
    with pytest.raises(ExportError, match="gguf f16, with rounded weights"):
        export(ExportArgs(model=str(best("llama")), format="gguf", output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_export_writes_a_gpt2_tokenizer(story_tokenizer, tmp_path):
    bpe = json.loads(story_tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    tokenizer = GPT2Tokenizer(vocab=bpe["vocab"], merges=merges, pad_token="<|endoftext|>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = tiny_model(vocab_size=300)  # more rows than tokens: a vocabulary rounded up
    save_model_folder(model, tokenizer, tmp_path / "best")
    folder = export(ExportArgs(model=str(tmp_path / "best"), format="gguf", output=tmp_path / "out"))

    exported_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
    assert exported_model.config.vocab_size == 300
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_export_rejects_a_tokenizer_that_llama_cpp_cannot_read(part, story_tokenizer, tmp_path):
    other = {
        "normalizer": normalizers.NFKC(),
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True),
    }
    setattr(story_tokenizer.backend_tokenizer, part, other[part])
    save_model_folder(tiny_model(vocab_size=288), story_tokenizer, tmp_path / "best")
    with pytest.raises(UserError, match=rf"the tokenizer's {part} is not that of GPT-2"):
        export(ExportArgs(model=str(tmp_path / "best"), format="gguf", output=tmp_path / "out"))


def test_export_rejects_an_activation_that_llama_cpp_lacks(story_tokenizer, tmp_path):
    save_model_folder(tiny_model(vocab_size=288, hidden_act="gelu"), story_tokenizer, tmp_path / "best")
    with pytest.raises(
        UserError, match=r"hidden_act \(gelu\): llama.cpp supports only gelu_pytorch_tanh for gpt2"
    ):
        export(ExportArgs(model=str(tmp_path / "best"), format="gguf", output=tmp_path / "out"))


@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_matches_the_model(family, quantization, exported, original, best, input_ids):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="compiling llama-cpp-python takes minutes; docs/exports.md has the command"
    )
    model, tokenizer = original(family), AutoTokenizer.from_pretrained(best(family))
    llama = llama_cpp.Llama(
        str(exported(family, "gguf", quantization=quantization) / "model.gguf"),
        n_ctx=48,
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,  # the type of the cache, float16 by default
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    for text in TOKENIZER_TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text).input_ids, text

    ids = input_ids[0].tolist()
    llama.eval(ids)
    logits = torch.from_numpy(np.array(llama.scores[: len(ids)]))
    # ggml reads GELU from a float16 table, and rounds activations to Q8_0 for Q8_0 weights.
    tolerance = {"f32": 0.01 if "gpt2" in family else 1e-4, "f16": 0.03, "q8_0": 0.4}[quantization]
    assert (logits - model(input_ids[:1]).logits[0]).abs().max() < tolerance

    if quantization == "f32":
        start = llama.tokenize(b"Once upon a time")
        assert start == [0, *tokenizer("Once upon a time").input_ids]  # llama.cpp adds the end token
        generated = list(islice(llama.generate(start, temp=0.0), 30))
        ids = torch.tensor([start])  # the first id is also the pad token, so a mask is needed
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert generated == expected[0, len(start) :].tolist()
    llama.close()
