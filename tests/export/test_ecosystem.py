"""Exports in other tools: `transformers serve`, PEFT and TRL (extras serve, finetune)."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tinystories_slm.export import ExportArgs, export
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM
from tinystories_slm.model_folder import save_model_folder

PROMPT = "<|endoftext|>Once upon a time"
FORMATS = [("llama", "custom"), ("llama, qk_norm, untied", "native"), ("gpt2", "native")]
STORIES = ["Once upon a time, a little fox went home.<|endoftext|>", "Lily was happy. Everyone was happy."]


def test_transformers_serve_streams_the_greedy_text_and_stops(story_tokenizer, tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'tinystories_slm[serve]'")
    # An overfitted model: an untrained one generates partial UTF-8 characters, which do not stream well.
    text = "Once upon a time, a fox went home. He was happy."
    model = overfit_model(text, story_tokenizer)
    save_model_folder(model, story_tokenizer, tmp_path / "best")
    folder = export(ExportArgs(model=str(tmp_path / "best"), format="native", output=tmp_path / "native"))
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stream": True}

    with _transformers_server(folder) as url:
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            lines = [line.decode().removeprefix("data: ").strip() for line in response]
    chunks = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(chunks) > 3
    generated = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert PROMPT + generated == "<|endoftext|>" + text
    ids = story_tokenizer(PROMPT, return_tensors="pt")
    native = AutoModelForCausalLM.from_pretrained(folder)
    greedy = native.generate(**ids, max_new_tokens=60, do_sample=False)[0]
    assert story_tokenizer.decode(greedy) == "<|endoftext|>" + text + "<|endoftext|>"


@pytest.mark.parametrize(
    ("format", "error", "message"),
    [
        ("custom", AttributeError, "no attribute TinyStoriesForCausalLM"),
        ("gguf", TypeError, "NoneType|unexpected keyword argument 'gguf_file'"),  # the latter up to 5.10
    ],
)
def test_transformers_serve_loads_neither_custom_nor_gguf(format, error, message, exported):
    pytest.importorskip("fastapi", reason="pip install 'tinystories_slm[serve]'")
    from transformers.cli.serving.model_manager import ModelManager

    manager = ModelManager(device="cpu", trust_remote_code=True)
    options = {"gguf_file": "model.gguf"} if format == "gguf" else {}
    # It reads the name of the class from the configuration, and looks it up in transformers.
    with pytest.raises(error, match=message):
        name = manager.process_model_name(str(exported("llama", format)))
        manager.load_model_and_processor(name, **options)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_needs_target_modules_for_custom_alone(family, exported):
    peft = pytest.importorskip("peft", reason="pip install 'tinystories_slm[finetune]'")
    default = peft.LoraConfig(task_type="CAUSAL_LM")
    custom = AutoModelForCausalLM.from_pretrained(exported(family, "custom"))
    # PEFT's defaults are a table of its own by `config.model_type`; nothing in a model's folder adds to it.
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(custom, default)

    for options in ({}, {"gguf_file": "model.gguf"}):
        folder = exported(family, "gguf" if options else "native")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, **options), default)
        targets = model.peft_config["default"].target_modules
        assert targets == ({"c_attn"} if family == "gpt2" else {"q_proj", "v_proj"})


@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_lora_adapter_trains_and_reloads(family, format, exported, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install 'tinystories_slm[finetune]'")
    folder = exported(family, format)
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    ids = AutoTokenizer.from_pretrained(folder)(STORIES[0], return_tensors="pt").input_ids
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert 0 < sum(map(torch.numel, trained)) < sum(map(torch.numel, model.parameters())) / 2

    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]

    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert torch.equal(reloaded.eval()(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_sft_trainer_fine_tunes_and_saves(family, format, exported, tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'tinystories_slm[finetune]'")
    from datasets import Dataset

    folder = exported(family, format)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sft_config = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_length=48,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = Dataset.from_dict({"text": STORIES})
    trainer = trl.SFTTrainer(model, args=sft_config, train_dataset=stories, processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]

    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    ids = tokenizer(STORIES[0], return_tensors="pt").input_ids
    assert type(tuned) is type(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(tuned.eval()(ids).logits, model.eval()(ids).logits)


def overfit_model(text: str, tokenizer: PreTrainedTokenizerFast) -> TinyStoriesForCausalLM:
    model = tiny_model(vocab_size=len(tokenizer), scale=1.0, family="llama", qk_norm=True)
    ids = torch.tensor([[0, *tokenizer(text).input_ids, 0]])
    assert ids.shape[1] <= model.config.max_position_embeddings
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    return model


@contextmanager
def _transformers_server(folder: Path) -> Iterator[str]:
    """Run `transformers serve` on `folder` in another process; yield its address."""
    command = "from transformers.cli.transformers import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", "--host=127.0.0.1", "--port=0", "--device=cpu", str(folder)],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                yield match[1]
                return
        raise AssertionError("".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=60)
