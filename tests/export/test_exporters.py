import json
import sys

import pytest
import torch
from conftest import ignore_the_cache, run_script
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tinystories_slm.commands.cli import run_command
from tinystories_slm.errors import UserError
from tinystories_slm.export import ExportArgs, ExportError, export, native
from tinystories_slm.export.checks import EquivalenceCheck, require_equal


def test_export_script_writes_and_prints_checks(best, tmp_path):
    output = tmp_path / "new" / "native"
    done = run_script("export.py", "--model", str(best("gpt2")), "--format=native", "--output", str(output))

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(str(output) in line for line in lines) == len(list(output.iterdir())) == 6
    assert "checked   GPT2LMHeadModel, float32: largest logits difference 0, the same greedy story" in lines
    assert any(line.startswith("checked   GPT2LMHeadModel, bfloat16: largest logits diff") for line in lines)
    assert lines[-1].startswith("largest logits difference of all checks: ")
    assert "it/s" not in done.stderr and "attention_mask" not in done.stderr


def test_manifest_has_format_versions_and_checks_but_no_path(best, exported, tmp_path):
    text = (exported("llama", "native") / "export.json").read_text()
    manifest = json.loads(text)

    assert (manifest["format"], manifest["dtype"]) == ("native", "float32")
    assert set(manifest["packages"]) == {"tinystories_slm", "torch", "transformers"}
    assert [check["max_difference"] for check in manifest["checks"]] == [0.0, 0.0]
    assert str(tmp_path.parent) not in text and str(best("llama")) not in text


def test_export_replaces_only_an_earlier_export(best, tmp_path):
    args = {"model": str(best("gpt2")), "format": "custom", "output": tmp_path / "out"}
    export(ExportArgs(**args))
    (tmp_path / "out" / "stale.txt").write_text("")
    export(ExportArgs(**args))
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output \(.*mine\) exists and is not an earlier export"):
        export(ExportArgs(**args | {"output": tmp_path / "mine"}))
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        export(ExportArgs(**args | {"output": tmp_path / "mine" / "novel.txt"}))
    with pytest.raises(UserError, match="cannot be written"):
        export(ExportArgs(**args | {"output": tmp_path / "mine" / "novel.txt" / "out"}))
    assert (tmp_path / "mine" / "novel.txt").read_text() == "mine"


def test_failed_export_raises_and_keeps_the_earlier_one(best, tmp_path, monkeypatch):
    args = ExportArgs(model=str(best("gpt2")), format="native", output=tmp_path / "out")
    export(args)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with_bias = native._with_bias
    monkeypatch.setattr(
        native, "_with_bias", lambda *a: {name: weight + 1e-6 for name, weight in with_bias(*a).items()}
    )
    with pytest.raises(ExportError, match=r"GPT2LMHeadModel, float32: largest logits difference [^0]"):
        export(args)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_native_export_allows_16_bit_rounding_but_no_fault(best, tmp_path, monkeypatch, capsys):
    args = ["--model", str(best("gpt2")), "--format=native", "--output", str(tmp_path / "out")]
    forward = Conv1D.forward

    def rounded_twice(layer, x):
        """Sum in two halves, as a CPU without bfloat16 instructions may round."""
        half = x.shape[-1] // 2
        if x.dtype != torch.bfloat16:
            return forward(layer, x)
        return x[..., :half] @ layer.weight[:half] + x[..., half:] @ layer.weight[half:] + layer.bias

    monkeypatch.setattr(Conv1D, "forward", rounded_twice)
    run_command(export, ExportArgs, args)
    exact, rounded = json.loads((tmp_path / "out" / "export.json").read_text())["checks"]
    assert exact["max_difference"] == exact["max_allowed"] == 0.0
    assert 0.0 < rounded["max_difference"] < 0.5 * rounded["max_allowed"]

    def faulty(layer, x):
        return forward(layer, x).roll(int(x.dtype == torch.bfloat16), dims=-1)

    monkeypatch.setattr(Conv1D, "forward", faulty)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(export, ExportArgs, args)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: GPT2LMHeadModel, bfloat16: ") and error.count("\n") == 1
    assert "is allowed, so nothing was written; install another version of transformers" in error
    assert json.loads((tmp_path / "out" / "export.json").read_text())["checks"] == [exact, rounded]


def test_require_equal_rejects_any_difference():
    good = EquivalenceCheck(name="native", max_difference=0.0, greedy_match=True)
    assert require_equal(good) is good
    for bad in (
        {"max_difference": 1e-9},
        {"greedy_match": False},
        {"max_difference": float("nan")},
        {"max_difference": float("nan"), "max_allowed": 0.1},
        {"max_difference": 0.11, "max_allowed": 0.1},
    ):
        with pytest.raises(ExportError, match="nothing was written"):
            require_equal(
                EquivalenceCheck(**{"name": "native", "max_difference": 0.0, "greedy_match": True} | bad)
            )


def test_export_rejects_a_model_that_ignores_its_cache(best, tmp_path, monkeypatch):
    ignore_the_cache(monkeypatch)
    with pytest.raises(
        ExportError, match=r"custom, float32: generation with the cache differs .* nothing was"
    ):
        export(ExportArgs(model=str(best("llama")), format="custom", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_export_args_reject_options_of_other_formats(best, tmp_path, monkeypatch):
    args = {"model": str(best("gpt2")), "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"dtype \(bfloat16\) applies to custom and native, not gguf"):
        ExportArgs(**args, format="gguf", dtype="bfloat16")
    with pytest.raises(UserError, match=r"quantization \(q8_0\) applies to gguf, not native"):
        ExportArgs(**args, format="native", quantization="q8_0")

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gguf is not installed; pip install 'tinystories_slm\[export\]'"):
        export(ExportArgs(**args, format="gguf"))
    assert not (tmp_path / "out").exists()


def test_export_rejects_a_foreign_model(best, tmp_path):
    foreign = tmp_path / "foreign"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=288)).save_pretrained(foreign)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (foreign / name).write_bytes((best("gpt2") / name).read_bytes())

    with pytest.raises(UserError, match="is a GPT2LMHeadModel, but only models trained here"):
        export(ExportArgs(model=str(foreign), format="native", output=tmp_path / "out"))
