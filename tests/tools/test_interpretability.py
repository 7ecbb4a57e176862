"""TransformerLens, nnsight and SAELens: each line of docs/tools.md."""

from pathlib import Path

import pytest
import torch
from tool_folders import (
    FORMATS,
    INSTALL,
    TEXT,
    assert_close,
    every_family,
    every_format,
    load,
    loading_options,
    text_ids,
)
from transformers import AutoTokenizer

from tinystories_slm.export.native import native_model


@every_family
@torch.no_grad()
def test_transformer_bridge_loads_native_and_gguf(family, published, model_of):
    pytest.importorskip("transformer_lens.model_bridge", reason=INSTALL)
    from transformer_lens.model_bridge import TransformerBridge

    native, gguf = published(family, "native"), published(family, "gguf")
    ids = text_ids(native)
    logits = model_of(family)(ids).logits
    bridge = TransformerBridge.boot_transformers(str(native), device="cpu")
    assert_close(bridge(ids), logits)
    # The bridge decides the start token by the class: Qwen3's texts lose it without the argument.
    assert torch.equal(bridge.to_tokens(TEXT, prepend_bos=True), ids)
    default = bridge.to_tokens(TEXT)
    assert torch.equal(default, ids[:, 1:] if "qk_norm" in family else ids)

    assert_close(boot_gguf(TransformerBridge, gguf)(ids), logits)
    with pytest.raises(ValueError, match="Could not determine supported architecture"):
        TransformerBridge.boot_transformers(
            str(published(family, "custom")), trust_remote_code=True, device="cpu"
        )


@every_family
@torch.no_grad()
def test_transformer_bridge_takes_a_model_of_ours_as_its_native_class(family, published, model_of):
    pytest.importorskip("transformer_lens.model_bridge", reason=INSTALL)
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge import TransformerBridge

    model, folder = model_of(family), str(published(family, "custom"))
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), text_ids(Path(folder))
    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=native_model(model), tokenizer=tokenizer, device="cpu"
    )
    logits, cache = bridge.run_with_cache(ids)
    expected = model(ids, output_hidden_states=True)
    assert_close(logits, expected.logits)
    assert_close(cache["blocks.0.hook_out"], expected.hidden_states[1])
    assert cache["blocks.1.attn.hook_pattern"].shape == (1, 4, ids.shape[1], ids.shape[1])

    # An adapter of our own would not be found: `boot_transformers` reads a table before the registry.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArchitectureAdapterFactory, "_adapters", dict(ArchitectureAdapterFactory._adapters))
        ArchitectureAdapterFactory.register_adapter(type(model).__name__, object)
        with pytest.raises(ValueError, match="Could not determine supported architecture"):
            TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, device="cpu")


def boot_gguf(bridge_class: type, folder: Path) -> torch.nn.Module:
    model = load(folder, "gguf", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return bridge_class.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer, device="cpu")


@every_family
@every_format
def test_nnsight_reads_the_logits_of_every_form(family, format, published, model_of):
    nnsight = pytest.importorskip("nnsight", reason=INSTALL)
    folder = published(family, format)
    expected = model_of(family)(text_ids(folder)).logits
    by_path = nnsight.TransformersModel(
        str(folder), task="text-generation", dispatch=True, **loading_options(format)
    )
    with by_path.trace(TEXT):
        logits = by_path.lm_head.output.save()
    assert_close(logits, expected)

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    by_model = nnsight.TransformersModel(load(folder, format), task="text-generation", tokenizer=tokenizer)
    with by_model.trace(TEXT):
        logits = by_model.lm_head.output.save()
    assert_close(logits, expected)
    with pytest.raises(Exception, match="which tokenizer"):
        nnsight.TransformersModel(load(folder, format), task="text-generation")


@every_family
@torch.no_grad()
def test_saelens_hooks_every_form(family, published, model_of):
    sae_lens = pytest.importorskip("sae_lens", reason=INSTALL)
    from sae_lens.load_model import load_model

    native = published(family, "native")
    ids = text_ids(native)
    expected = model_of(family)(ids, output_hidden_states=True)
    bridge = sae_lens.SAETransformerBridge.boot_transformers(str(native), device="cpu")
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=32, d_sae=64, device="cpu"))
    sae.cfg.metadata.hook_name = "blocks.0.hook_out"
    _, activations = bridge.run_with_cache_with_saes(ids, saes=[sae])
    assert activations["blocks.0.hook_out.hook_sae_acts_post"].shape == (*ids.shape, 64)
    assert_close(bridge(ids), expected.logits)
    gguf = boot_gguf(sae_lens.SAETransformerBridge, published(family, "gguf"))
    assert_close(gguf(ids), expected.logits)

    for format in FORMATS:
        options = {"model_from_pretrained_kwargs": loading_options(format)}
        model = load_model("AutoModelForCausalLM", str(published(family, format)), device="cpu", **options)
        layer = "transformer.h.0" if family == "gpt2" and format != "custom" else "model.layers.0"
        _, activations = model.run_with_cache(ids, names_filter=[layer])
        assert_close(activations[layer], expected.hidden_states[1])


@pytest.mark.parametrize("format", ["custom", "native"])
def test_saelens_trains_saves_and_loads_a_sparse_autoencoder(format, published, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason=INSTALL)
    from datasets import Dataset

    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.StandardTrainingSAEConfig(d_in=32, d_sae=64, l1_coefficient=0.1),
        model_name=str(published("llama", format)),
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs=loading_options(format),
        hook_name="model.layers.0",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=16,
        training_tokens=4_096,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        lr=1e-2,
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(tmp_path / "sae"),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        device="cpu",
    )
    stories = Dataset.from_dict({"text": [TEXT, "Everyone was happy.", "The fox saw a hole."] * 50})
    trained = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=stories).run()
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "sae")

    hidden = []
    model = load(published("llama", format), format)
    model.model.layers[0].register_forward_hook(lambda module, args, output: hidden.append(output))
    with torch.no_grad():
        model(text_ids(published("llama", format)))
        activations = hidden[0][0, 1:]  # (T, 32); the start token is in no training sequence of this length
        found = loaded(activations)
        assert torch.allclose(found, trained(activations), atol=1e-5)
        unexplained = (found - activations).pow(2).sum() / (activations - activations.mean(0)).pow(2).sum()
    assert unexplained < 0.5
