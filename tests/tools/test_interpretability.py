"""Exports in other tools: each line of docs/tools.md about a tool of the extra `research`."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.evaluation.evaluate import score_texts
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.export import ExportArgs, export
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder, save_model_folder

INSTALL = "pip install 'tinystories_slm[research]'"
TEXT = "Once upon a time, there was a little fox."
MAX_DIFFERENCE = 1e-4  # measured: 3e-6
CLASSES = ["gpt2", "llama", "llama, qk_norm, untied"]
FORMATS = ["custom", "native", "gguf"]

every_family = pytest.mark.parametrize("family", CLASSES)
every_format = pytest.mark.parametrize("format", FORMATS)

ExportFolder = Callable[[str, str], Path]
Original = Callable[[str], TinyStoriesForCausalLM]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> ExportFolder:
    """Return `published(family, format)`, the folder of a model whose tokenizer adds the start token."""

    @cache
    def best(family: str) -> Path:
        tokenizer = train_story_tokenizer([TEXT, "Everyone was happy."] * 5, 272)
        ids = {"pad_token_id": tokenizer.pad_token_id}
        model = tiny_model(vocab_size=len(tokenizer), intermediate_size=128, **ids, **FAMILIES[family])
        return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "best")

    @cache
    def folder(family: str, format: str) -> Path:
        if format == "best":
            return best(family)
        output = tmp_path_factory.mktemp("export") / format
        options = {"quantization": "f32"} if format == "gguf" else {}
        return export(ExportArgs(model=str(best(family)), format=format, output=output, **options))

    return folder


@pytest.fixture(scope="session")
def model_of(published: ExportFolder) -> Original:
    """Return the model of a family, which the tools' results are compared with."""
    return cache(lambda family: load_model_folder(str(published(family, "best")), device="cpu")[0])


def loading_options(format: str) -> dict[str, object]:
    """Return what `from_pretrained` and most tools take to load a folder of `format`."""
    return {"custom": {"trust_remote_code": True}, "native": {}, "gguf": {"gguf_file": "model.gguf"}}[format]


def load(folder: Path, format: str, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **loading_options(format), **options).eval()


def text_ids(folder: Path) -> torch.Tensor:
    """Return the ids of `TEXT` with its start token, (1, T)."""
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXT, return_tensors="pt").input_ids
    assert ids[0, 0] == 0 and ids[0, 1] != 0
    return ids


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < MAX_DIFFERENCE


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
@every_format
@torch.no_grad()
def test_lm_eval_scores_the_text_without_its_end(family, format, published, model_of):
    pytest.importorskip("lm_eval", reason=INSTALL)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = published(family, format)
    options = {"pretrained": str(folder), "device": "cpu", "batch_size": 1, **loading_options(format)}
    if format == "gguf":
        options["tokenizer"] = str(folder)  # transformers reads no end token from the file
    kwargs = {"doc": {}, "idx": 0}
    whole = Instance(request_type="loglikelihood", arguments=("", TEXT), **kwargs)
    [(log_likelihood, _)] = HFLM(**options).loglikelihood([whole], disable_tqdm=True)

    ids = text_ids(folder)
    scores = score_stories(model_of(family), ids[:, 1:].tolist(), eos_token_id=0, batch_size=1)
    end = -model_of(family)(ids).logits[0, -1].log_softmax(-1)[0].item()
    assert end > 1 and scores.num_tokens[0] == ids.shape[1]  # without the start, with the end
    assert -log_likelihood == pytest.approx(scores.nats[0] - end, abs=1e-3)

    rolling = Instance(request_type="loglikelihood_rolling", arguments=(TEXT,), **kwargs)
    [log_likelihood] = HFLM(**options, add_bos_token=False).loglikelihood_rolling(
        [rolling], disable_tqdm=True
    )
    assert -log_likelihood == pytest.approx(scores.nats[0] - end, abs=1e-3)


@pytest.mark.parametrize("format", ["custom", "native"])
def test_lm_eval_task_has_our_bits_per_byte_of_the_text(format, published, model_of, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason=INSTALL)
    from lm_eval.tasks import TaskManager

    texts = [TEXT, "Everyone was happy.", "Zoë saw 🦊.", "She ran."]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "include": str(ROOT / "configs" / "lm_eval" / "tinystories.yaml"),
        "task": "my_stories",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "stories.jsonl")}},
    }
    (tmp_path / "my_stories.yaml").write_text(json.dumps(task))
    folder = published("llama", format)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "add_bos_token": False, **loading_options(format)},
        tasks=["my_stories"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    expected = score_texts(model_of("llama"), tokenizer, texts, batch_size=2)
    found = results["results"]["my_stories"]["bits_per_byte,none"]
    assert found == pytest.approx(expected["text_bits_per_byte"], rel=1e-5)
    assert found != pytest.approx(expected["bits_per_byte"], rel=1e-2)  # with the end tokens


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
