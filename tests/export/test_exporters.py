import errno
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ignore_the_cache, run_script, tiny_model
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tinystories_slm.commands.cli import run_command
from tinystories_slm.errors import UserError
from tinystories_slm.export import ExportArgs, ExportError, export, exporters, native
from tinystories_slm.export.checks import EquivalenceCheck, require_equal
from tinystories_slm.export.exporters import ExportFormat


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


_FILES = {
    "custom": ("config.json", "model.bin", "code/a.py"),
    "native": ("config.json", "model.bin", "n.txt"),
}


@pytest.fixture
def quick_export(best, tmp_path, monkeypatch):
    """A function that exports to `tmp_path / "out"`, in a format whose files are written at once."""

    def write_files(model, tokenizer, folder, args: ExportArgs) -> list:
        for name in _FILES[args.format]:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(args.format)
        return []

    for name in _FILES:
        monkeypatch.setitem(exporters.EXPORT_FORMATS, name, ExportFormat(write=write_files))
    monkeypatch.setattr(exporters, "load_model_folder", lambda *args, **kwargs: (tiny_model(), None))
    monkeypatch.setattr(exporters, "prepare_for_export", lambda tokenizer: None)

    def run(format: str, output: Path = tmp_path / "out") -> dict:
        export(ExportArgs(model="m", format=format, output=output))
        return json.loads((output / "export.json").read_text())

    return run


def test_export_replaces_only_the_files_of_an_earlier_export(quick_export, tmp_path, monkeypatch):
    out = tmp_path / "out"
    manifest = quick_export("custom")
    assert manifest["files"] == ["code/a.py", "config.json", "export.json", "model.bin"]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "novel.txt").write_text("mine")
    theirs = {".git/HEAD": "ref: refs/heads/main", "README.md": "sdk: static", "docs/a.md": "mine"}
    for name, text in theirs.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    # A list that somebody else wrote removes nothing outside the folder.
    (out / "link").symlink_to(tmp_path / "kept")
    manifest["files"] += ["../kept/novel.txt", str(tmp_path / "kept" / "novel.txt"), "link/novel.txt"]
    (out / "export.json").write_text(json.dumps(manifest))

    monkeypatch.chdir(out)
    assert quick_export("native", Path())["files"] == ["config.json", "export.json", "model.bin", "n.txt"]
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {"config.json", "export.json", "model.bin", "n.txt", *theirs}
    assert not (out / "code").exists() and (out / "config.json").read_text() == "native"
    assert all((out / name).read_text() == text for name, text in theirs.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out"]
    assert (tmp_path / "kept" / "novel.txt").read_text() == "mine"


@pytest.mark.parametrize("obstacle", ["code/a.py", "code"])
def test_export_does_not_replace_a_file_of_the_user(quick_export, tmp_path, obstacle):
    out = tmp_path / "out"
    quick_export("native")
    (out / obstacle).parent.mkdir(exist_ok=True)
    (out / obstacle).write_text("mine")
    with pytest.raises(UserError, match=rf"out\) holds {obstacle}, which no export wrote; move it away"):
        quick_export("custom")
    assert (out / obstacle).read_text() == "mine" and (out / "config.json").read_text() == "native"
    assert not list(out.glob(".*"))


def test_export_of_an_earlier_version_without_a_list_is_replaced_by_name(quick_export, tmp_path):
    (tmp_path / "out").mkdir()
    for name, text in {"export.json": '{"format": "native"}', "config.json": "old", "a.md": "mine"}.items():
        (tmp_path / "out" / name).write_text(text)
    quick_export("native")
    assert (tmp_path / "out" / "a.md").read_text() == "mine"
    assert (tmp_path / "out" / "config.json").read_text() == "native"
    (tmp_path / "out" / "export.json").write_text("[]")
    with pytest.raises(UserError, match=r"has an export\.json that is not of an export"):
        quick_export("native")


def test_killed_export_is_completed_by_the_next(quick_export, tmp_path, monkeypatch):
    quick_export("custom")
    replace, count = os.replace, itertools.count()

    def killed(source, target):
        if next(count) == 3:  # two manifests and one file are in place
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        quick_export("native")
    assert (tmp_path / "out" / "config.json").read_text() == "native"
    assert (tmp_path / "out" / "model.bin").read_text() == "custom"
    (tmp_path / "out" / ".export.partial").mkdir()  # as after a kill that nothing cleans up
    assert quick_export("native")["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_keeps_the_earlier_export(quick_export, tmp_path, monkeypatch, error):
    def full(*args):
        raise error

    quick_export("native")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setitem(exporters.EXPORT_FORMATS, "custom", ExportFormat(write=full))
    with pytest.raises(UserError, match=r"output \(.*out\) cannot be written to \(.*No space.*; free disk"):
        quick_export("custom")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_export_leaves_other_folders_alone(quick_export, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "novel.txt").write_text("mine")
    quick_export("custom")
    assert (tmp_path / "out.partial" / "novel.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_export_rejects_a_folder_or_file_of_the_user(quick_export, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output \(.*mine\) exists and is not an earlier export"):
        quick_export("custom", tmp_path / "mine")
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        quick_export("custom", tmp_path / "mine" / "novel.txt")
    with pytest.raises(UserError, match="cannot be written"):
        quick_export("custom", tmp_path / "mine" / "novel.txt" / "out")
    with pytest.raises(UserError, match=r"cannot be written to \(File name too long\); use a shorter name"):
        quick_export("custom", tmp_path / ("long" * 64))
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
