import copy
import json

import pytest
import torch
from conftest import FAMILIES, tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from tinystories_slm.export.checks import MAX_DIFFERENCE_16_BIT
from tinystories_slm.export.native import native_model

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt2 with biases": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "llama, grouped queries": "LlamaForCausalLM",
    "llama, qk_norm, untied": "Qwen3ForCausalLM",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_native_export_equals_the_model(family, exported, original, input_ids):
    folder = exported(family, "native")
    model = original(family)
    for dtype in (torch.float32, torch.bfloat16):
        native = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        assert type(native).__name__ == CLASSES[family]
        assert type(native).__module__.startswith("transformers.models.")
        # A copy, because `to` rounds in place and other tests use the same model.
        logits = [network(input_ids).logits.float() for network in (native, copy.deepcopy(model).to(dtype))]
        if CLASSES[family] == "GPT2LMHeadModel" and dtype == torch.bfloat16:
            # One joint product for queries, keys and values: equal only on CPUs with bfloat16 instructions.
            bound = MAX_DIFFERENCE_16_BIT * logits[1].abs().max()
            assert (logits[0] - logits[1]).abs().max() < bound
        else:
            assert torch.equal(*logits)
    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
    tied = native.get_input_embeddings().weight.data_ptr() == native.lm_head.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("qk_norm", [False, True])
def test_native_model_supports_relu2(qk_norm):
    model = tiny_model(family="llama", qk_norm=qk_norm, hidden_act="relu2")
    native, ids = native_model(model), torch.arange(40)[None]

    assert torch.equal(native(ids).logits, model(ids).logits)
    plain = tiny_model(family="llama", qk_norm=qk_norm)
    assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-3)


def test_native_export_stores_weights_in_the_given_dtype(exported, original, input_ids):
    folder = exported("llama", "native", dtype="bfloat16")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    native = AutoModelForCausalLM.from_pretrained(folder)

    assert native.dtype == torch.bfloat16 and native.model.rotary_emb.inv_freq.dtype == torch.float32
    rounded = type(original("llama"))(original("llama").config)
    rounded.load_state_dict(original("llama").state_dict())
    assert torch.equal(native(input_ids).logits, rounded.to(torch.bfloat16)(input_ids).logits)


def test_config_has_the_keys_of_transformers_4(exported):
    config = json.loads((exported("llama", "native") / "config.json").read_text())
    tokenizer = json.loads((exported("llama", "native") / "tokenizer_config.json").read_text())

    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("format", ["custom", "native", "gguf"])
def test_generation_config_samples_and_stops_but_has_no_length(format, exported, best):
    folder = exported("llama", format)
    defaults = GenerationConfig.from_pretrained(folder)

    assert (defaults.do_sample, defaults.temperature, defaults.top_k, defaults.top_p) == (True, 0.8, 50, 0.95)
    assert defaults.eos_token_id == defaults.pad_token_id == 0
    assert defaults.max_new_tokens is None and defaults.max_length is None
    learned = GenerationConfig.from_pretrained(exported("gpt2", format))
    # The model has no further positions; the class of transformers would warn of the limit at each call.
    assert learned.max_new_tokens is None and learned.max_length == (48 if format == "custom" else None)
    text = "Zoë and the 🦊  met   <|endoftext|>"
    tokenizers = [
        AutoTokenizer.from_pretrained(path, trust_remote_code=False) for path in (folder, best("llama"))
    ]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids


def test_generate_and_pipeline_stop_at_the_end_of_text(exported):
    model = AutoModelForCausalLM.from_pretrained(exported("llama, qk_norm, untied", "native"))
    tokenizer = AutoTokenizer.from_pretrained(exported("llama, qk_norm, untied", "native"))
    ids = tokenizer("Once upon a time", return_tensors="pt")
    hidden = model.model(**ids).last_hidden_state[0, -1]
    with torch.no_grad():
        model.lm_head.weight[0] = 100 * hidden  # the end token is certain after this prompt

    assert model.generate(**ids, max_new_tokens=20)[0, ids.input_ids.shape[1] :].tolist() == [0]
    generated = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "Once upon a time", max_new_tokens=20
    )
    assert generated[0]["generated_text"] == "Once upon a time"
