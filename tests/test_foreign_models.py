"""Causal language models that were not trained here; their code runs only if it is trusted."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from tinystories_slm.commands.generate import generate
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.generation import (
    SamplingParams,
    TextStream,
    generate_batch,
    generate_texts,
    prepare_requests,
)
from tinystories_slm.generation.request import context_length
from tinystories_slm.model_folder import load_model_folder, save_model_folder

TEXT = ["Once upon a time there was a fox. The fox was happy.\nShe ran home."] * 3
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2's: `<|endoftext|>` separates texts and is not added automatically; no padding token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(TEXT, 280), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Like Qwen's: no start token, and an end token."""
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe(TEXT, 280), eos_token="<|endoftext|>")


def llama_tokenizer(ends_texts: bool = False) -> PreTrainedTokenizerFast:
    """Like Llama's: adds `<s>` before each text, treats blanks as part of words, has no padding token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    trained = json.loads(backend.to_str())
    vocab = trained["model"]["vocab"]
    # Byte fallback needs 256 more entries, which are not special tokens.
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    backend = Tokenizer.from_str(json.dumps(trained))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends_texts else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 48}
FOREIGN = {
    "GPT-2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=48)),
        gpt2_tokenizer,
    ),
    "Llama, untied": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), llama_tokenizer),
    "Llama, tied, no start token": (
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        qwen_tokenizer,
    ),
    "Mistral, sliding window": (
        lambda: MistralForCausalLM(MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=8)),
        llama_tokenizer,
    ),
    "Mamba, no context limit": (
        lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4, expand=1)),
        gpt2_tokenizer,
    ),
}


@pytest.fixture(scope="module", params=FOREIGN, ids=FOREIGN.keys())
def foreign(request, tmp_path_factory) -> Path:
    """A folder that transformers wrote."""
    make_model, make_tokenizer = FOREIGN[request.param]
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_foreign_model_generates_the_same_text_in_a_batch_and_streamed(foreign):
    model, tokenizer = load_model_folder(str(foreign), device="cpu")
    sampling = SamplingParams(max_new_tokens=25)
    prompts = ["Once upon a time", "The fox", "She"]
    requests = prepare_requests(model, tokenizer, prompts, [7, 8, 9], sampling)

    results = list(generate_batch(model, tokenizer, requests, sampling, batch_size=3))
    for request, result in zip(requests, results, strict=True):
        assert result.text.startswith(request.prompt) and result.num_new_tokens > 0
        assert [result] == list(generate_batch(model, tokenizer, [request], sampling, batch_size=1))
        stream = TextStream(model, tokenizer, request, sampling)
        assert "".join(stream) == result.text and stream.result == result


@pytest.mark.parametrize("make_tokenizer", [gpt2_tokenizer, llama_tokenizer])
@pytest.mark.parametrize("text", ["The fox.\n She ran home.\n\n The end", "Zoë saw 🦊🦊 and 狐狸\n🦊"])
def test_joined_pieces_equal_the_text(make_tokenizer, text, monkeypatch):
    model, tokenizer = (
        LlamaForCausalLM(LlamaConfig(**LLAMA | {"max_position_embeddings": 500})),
        make_tokenizer(),
    )
    new_ids = [token for token in tokenizer(text).input_ids if token != tokenizer.bos_token_id]

    def scripted_generate(*, input_ids, streamer, **_):
        streamer.put(input_ids)
        for token in new_ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([new_ids])], dim=1)

    monkeypatch.setattr(model, "generate", scripted_generate)
    [request] = prepare_requests(model, tokenizer, ["A fox."], [0], SamplingParams())
    stream = TextStream(model, tokenizer, request, SamplingParams())
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text
    assert stream.result.text.endswith(text)
    assert not any("\ufffd" in piece for piece in pieces)


def test_foreign_model_can_be_evaluated(foreign, tmp_path, capsys):
    stories = tmp_path / "stories.txt"
    stories.write_text("The fox was happy.\n<|endoftext|>\nOnce upon a time there was a fox.\n")
    report = evaluate(
        EvaluateArgs(model=str(foreign), data=str(stories), split="train", device="cpu", batch_size=2)
    )
    assert report["num_stories"] == 2 and report["num_tokens"] > 10
    assert 0 < report["loss"] < 60


def first_ids(model, tokenizer, prompt: str) -> list[int]:
    [request] = prepare_requests(model, tokenizer, [prompt], [0], GREEDY)
    return request.token_ids


def test_prompt_starts_with_the_start_token_of_the_model():
    foreign, ours = LlamaForCausalLM(LlamaConfig(**LLAMA)), tiny_model(vocab_size=300)
    gpt2, qwen, llama = gpt2_tokenizer(), qwen_tokenizer(), llama_tokenizer()
    fox = gpt2("The fox").input_ids

    assert first_ids(foreign, gpt2, "The fox") == [0, *fox]  # <|endoftext|> separates texts
    assert first_ids(foreign, gpt2, "<|endoftext|>The fox") == [0, *fox]  # not added twice
    assert first_ids(foreign, qwen, "The fox") == fox
    assert first_ids(foreign, llama, "The fox") == llama("The fox").input_ids
    assert llama("The fox").input_ids[0] == 1 and llama("The fox").input_ids[1] != 1
    assert first_ids(foreign, llama_tokenizer(ends_texts=True), "The fox") == llama("The fox").input_ids
    assert first_ids(foreign, qwen, "") == [0] and first_ids(foreign, llama, "")[0] == 1
    # Training puts the end token before each document, and no tokens that the tokenizer would add.
    assert first_ids(ours, llama, "The fox") == [2, *llama("The fox").input_ids[1:]]


def test_any_of_several_stop_tokens_ends_the_text():
    model, tokenizer = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval(), llama_tokenizer()
    [request] = prepare_requests(model, tokenizer, ["The fox"], [0], GREEDY)
    [full] = generate_batch(model, tokenizer, [request], GREEDY, batch_size=1)
    ids = torch.tensor([request.token_ids])
    first, second = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)[0, -2:].tolist()
    assert full.num_new_tokens == 12 and full.finish_reason == "length" and first != second

    model.generation_config = GenerationConfig(eos_token_id=[2, second], num_beams=3, repetition_penalty=9.0)
    [stopped] = generate_batch(model, tokenizer, [request], GREEDY, batch_size=1)
    assert stopped.finish_reason == "stop" and stopped.num_new_tokens == 1
    assert stopped.text == tokenizer.decode([*request.token_ids, first], skip_special_tokens=True)
    assert model.generation_config.num_beams == 3  # restored


def test_context_limits_new_tokens_if_the_model_has_a_limit():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=20))
    mamba = MambaForCausalLM(MambaConfig(**SIZES, state_size=4, expand=1))
    assert (context_length(gpt2), context_length(mamba)) == (20, None)
    [request] = prepare_requests(gpt2, gpt2_tokenizer(), ["The fox"], [0], SamplingParams(max_new_tokens=100))
    assert len(request.token_ids) + request.max_new_tokens == 20
    assert generate_texts(gpt2, gpt2_tokenizer(), ["The fox"], seed=0)[0].startswith("The fox")


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(tmp_path) -> tuple[Path, Path]:
    """(A folder that includes code, the file that this code creates when it runs)."""
    folder, marker = tmp_path / "odd", tmp_path / "it-ran"
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    edit(
        folder / "config.json",
        model_type="odd",
        architectures=["OddForCausalLM"],
        auto_map={"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"},
    )
    (folder / "odd.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_code_of_a_model_folder_runs_only_if_trusted(odd, monkeypatch):
    folder, marker = odd
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt for input"))
    for command in (
        lambda: generate(GenerateArgs(model=str(folder))),
        lambda: evaluate(EvaluateArgs(model=str(folder), data="builtin")),
    ):
        with pytest.raises(UserError, match=r"includes code that was not run.*--trust_remote_code") as no:
            command()
        assert "\n" not in str(no.value)
    assert not marker.exists()

    [result] = generate(
        GenerateArgs(model=str(folder), max_new_tokens=3, device="cpu", trust_remote_code=True)
    )
    assert result.text.startswith("Once upon a time") and marker.exists()


def test_code_of_a_folder_with_a_known_model_class_does_not_run(odd, tmp_path):
    folder, marker = odd
    odd_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    edit(folder / "config.json", model_type="llama", auto_map=odd_map)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "odd.OddTokenizer"]})
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "odd.py", folder / "custom_generate" / "generate.py")
    ours = save_model_folder(tiny_model(vocab_size=300), gpt2_tokenizer(), tmp_path / "ours")
    for path in ours.glob("*.py"):
        path.write_text(CODE.format(marker=str(marker)) + path.read_text())

    for model in (folder, ours):
        [result] = generate(GenerateArgs(model=str(model), max_new_tokens=3, device="cpu"))
        assert result.text.startswith("Once upon a time")
    assert not marker.exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_weights_load_without_running_code(odd, tmp_path):
    folder, marker = odd
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    ids = torch.tensor([[1, 5, 6]])
    assert torch.equal(load_model_folder(str(folder), device="cpu")[0](ids).logits, model.eval()(ids).logits)

    torch.save({"lm_head.weight": _Touch(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model_folder(str(folder))
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Touch(marker)))
    assert marker.exists()  # a plain pickle.loads runs the code


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"model": "nobody/nothing"},
            r"'nobody/nothing' \(revision main\) is neither a local folder nor in the cache",
        ),
        (
            {"model": "nobody/nothing", "revision": "v1"},
            r"'nobody/nothing' \(revision v1\) is neither a local",
        ),
        (
            {"model": "runs/absent/best"},
            "'runs/absent/best' is neither a local folder nor a readable repository",
        ),
        ({"model": "./absent"}, "is not a model folder"),
        ({"model": str(ROOT), "revision": "v1"}, "is not a model folder"),
        ({"model": "x", "device": "mps"}, r"device \(mps\) is not available"),
    ],
)
def test_unavailable_model_raises_a_one_line_error(args, message):
    if args.get("device") == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has an MPS device")
    args = dict(args)
    with pytest.raises(UserError, match=message) as error:
        load_model_folder(args.pop("model"), **args)
    assert "\n" not in str(error.value)


def test_revision_of_a_local_folder_is_rejected(odd):
    with pytest.raises(UserError, match=r"revision \(v1\) requires a Hub model, and model .* is local"):
        load_model_folder(str(odd[0]), revision="v1")


def test_revision_applies_to_model_tokenizer_and_code(odd, tmp_path):
    """The cache has two commits and the Hub is offline; branch, tag and commit select one of them."""
    folder, _ = odd
    cache = tmp_path / "hf" / "hub" / "models--someone--odd"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for ref, commit in commits.items():
        snapshot = cache / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / ref).write_text(commit)
        edit(snapshot / "tokenizer_config.json", model_max_length=len(ref))
        edit(snapshot / "config.json", max_position_embeddings=100 + len(ref))
        (snapshot / "odd.py").write_text((folder / "odd.py").read_text() + f"REF = {ref!r}\n")
    code = """
import sys
from tinystories_slm.model_folder import load_model_folder
for revision in (None, "main", "v1", "b" * 40):
    model, tokenizer = load_model_folder("someone/odd", revision=revision, trust_remote_code=True)
    ref = sys.modules[type(model).__module__].REF
    print(ref, tokenizer.model_max_length, model.config.max_position_embeddings)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["main 4 104", "main 4 104", "v1 2 102", "v1 2 102"]
