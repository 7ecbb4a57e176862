"""Model folders: replaced atomically, loaded with equal weights with and without this package."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_model

from tinystories_slm.config.command_args.publish import ExportArgs
from tinystories_slm.errors import UserError
from tinystories_slm.export import export
from tinystories_slm.model_folder import load_model_folder, save_model_folder, weights_sha256
from tinystories_slm.text_boundaries import text_boundaries


def test_save_replaces_the_complete_folder(model_with_tokenizer, tokenizer, tmp_path):
    folder = tmp_path / "best"
    (folder / "leftover").mkdir(parents=True)
    save_model_folder(model_with_tokenizer, tokenizer, folder)
    save_model_folder(model_with_tokenizer, tokenizer, folder)

    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "configuration_tinystories.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_tinystories.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0 and "max_new_tokens" not in generation
    model, loaded_tokenizer = load_model_folder(str(folder))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, model_with_tokenizer(ids).logits)
    assert loaded_tokenizer("Once upon").input_ids == tokenizer("Once upon").input_ids


def test_damaged_model_folder_is_a_one_line_error(model_with_tokenizer, tokenizer, tmp_path):
    folder = save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "best")
    config = (folder / "config.json").read_text()
    for name, content in [
        ("config.json", config.replace('"hidden_size": 32', '"hidden_size": 33').encode()),
        ("config.json", config.replace('"intermediate_size": 128', '"intermediate_size": 64').encode()),
        ("config.json", config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3').encode()),
        ("config.json", config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1').encode()),
        ("config.json", b"{"),
        ("model.safetensors", (folder / "model.safetensors").read_bytes()[:100]),
    ]:
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded") as error:
            load_model_folder(str(folder))
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(original)


def test_pipes_folders_and_dangling_links_are_one_line_errors(model_with_tokenizer, tokenizer, tmp_path):
    """A pipe has no writer: reading it would never end."""
    folder = save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "best")
    for name in ("model.safetensors", "tokenizer.json"):
        for damage in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")):
            (folder / name).rename(tmp_path / name)
            damage(folder / name)
            with pytest.raises(UserError, match=rf"{name} must be a regular file; replace or delete it"):
                load_model_folder(str(folder))
            (folder / name).unlink() if not (folder / name).is_dir() else (folder / name).rmdir()
            (tmp_path / name).rename(folder / name)
    load_model_folder(str(folder))


def test_gguf_file_loads_as_the_folder_does(tokenizer, tmp_path):
    model = tiny_model(vocab_size=len(tokenizer), family="llama")
    model.config.training_data = [{"source": "builtin"}]
    folder = save_model_folder(model, tokenizer, tmp_path / "best")
    args = ExportArgs(model=str(folder), format="gguf", quantization="f32", output=tmp_path / "exported")
    file = export(args) / "model.gguf"
    loaded, of_file = load_model_folder(str(file))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert of_file("Once upon", add_special_tokens=False) == tokenizer("Once upon", add_special_tokens=False)
    assert text_boundaries(loaded, of_file) == text_boundaries(model, tokenizer)
    assert loaded.config.training_data == model.config.training_data
    assert weights_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"revision \(main\) requires a Hub model, and .* is local"):
        load_model_folder(str(file), revision="main")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"model '.*model.gguf' cannot be loaded: ") as error:
        load_model_folder(str(file))
    assert "\n" not in str(error.value)


def test_folder_loads_without_this_package(model_with_tokenizer, tokenizer, tmp_path):
    folder = save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "best")
    code = """
import builtins, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tinystories_slm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers import PreTrainedTokenizerFast
folder = sys.argv[1]
builtins.input = sys.exit  # no question whether to run the model's code (docs/exports.md)
plain = PreTrainedTokenizerFast.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
assert plain("The fox").input_ids == tokenizer("The fox").input_ids
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "tinystories_slm"
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.hidden_size == 32
assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
ids = tokenizer("The fox", return_tensors="pt")
torch.manual_seed(0)
out = model.generate(**ids, max_new_tokens=30, do_sample=True, top_k=5, top_p=0.9)
ended = (out[0] == tokenizer.eos_token_id).nonzero()
assert len(ended) == 0 or ended[0].item() == out.shape[1] - 1
generated = pipeline("text-generation", model=folder, trust_remote_code=True)("The fox", max_new_tokens=9)
print(generated[0]["generated_text"])
print(model(ids.input_ids).logits.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text, logits_sum = done.stdout.strip().rsplit("\n", 1)
    assert text.startswith("The fox")
    ids = torch.tensor([tokenizer("The fox").input_ids])
    assert float(logits_sum) == model_with_tokenizer(ids).logits.double().sum().item()


@pytest.mark.skipif(os.name == "nt", reason="modes are those of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_saved_files_have_the_mode_of_the_umask(model_with_tokenizer, tokenizer, tmp_path, umask):
    earlier = os.umask(umask)
    try:
        folder = save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "best")
    finally:
        os.umask(earlier)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask} and "model.safetensors" in modes
