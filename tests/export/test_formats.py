import json
import sys

import pytest
from conftest import ignore_the_cache, run_script
from transformers import GPT2Config, GPT2LMHeadModel

from tinystories_slm.errors import InputError
from tinystories_slm.export import ExportArgs, ExportError, export, native
from tinystories_slm.export.checks import Check, require_equal


def test_the_script_writes_checks_and_says_so(best, tmp_path):
    output = tmp_path / "new" / "native"
    done = run_script("export.py", "--model", str(best("gpt")), "--format=native", "--output", str(output))

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(str(output) in line for line in lines) == len(list(output.iterdir())) == 6
    assert "checked   GPT2LMHeadModel, bfloat16: largest logits difference 0, the same greedy story" in lines
    assert lines[-1] == "largest logits difference of all: 0"
    assert "it/s" not in done.stderr and "attention_mask" not in done.stderr


def test_the_record_tells_form_versions_and_checks_but_no_path(best, exported, tmp_path):
    text = (exported("modern", "native") / "export.json").read_text()
    record = json.loads(text)

    assert (record["format"], record["dtype"]) == ("native", "float32")
    assert set(record["packages"]) == {"tinystories_slm", "torch", "transformers"}
    assert [check["max_difference"] for check in record["checks"]] == [0.0, 0.0]
    assert str(tmp_path.parent) not in text and str(best("modern")) not in text


def test_an_earlier_export_is_replaced_and_anything_else_refused(best, tmp_path):
    args = {"model": str(best("gpt")), "format": "custom", "output": tmp_path / "out"}
    export(ExportArgs(**args))
    (tmp_path / "out" / "stale.txt").write_text("")
    export(ExportArgs(**args))
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output \(.*mine\) is there and is no export"):
        export(ExportArgs(**args | {"output": tmp_path / "mine"}))
    with pytest.raises(InputError, match="is there and is no export"):
        export(ExportArgs(**args | {"output": tmp_path / "mine" / "novel.txt"}))
    with pytest.raises(InputError, match="cannot be written"):
        export(ExportArgs(**args | {"output": tmp_path / "mine" / "novel.txt" / "out"}))
    assert (tmp_path / "mine" / "novel.txt").read_text() == "mine"


def test_an_export_that_computes_something_else_raises_and_leaves_the_old_one(best, tmp_path, monkeypatch):
    args = ExportArgs(model=str(best("gpt")), format="native", output=tmp_path / "out")
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


def test_one_bit_or_another_story_is_not_equal():
    good = Check(name="native", max_difference=0.0, same_text=True)
    assert require_equal(good) is good
    for bad in ({"max_difference": 1e-9}, {"same_text": False}, {"max_difference": float("nan")}):
        with pytest.raises(ExportError, match="nothing was written"):
            require_equal(Check(**{"name": "native", "max_difference": 0.0, "same_text": True} | bad))


def test_a_model_that_ignores_its_cache_is_not_exported(best, tmp_path, monkeypatch):
    ignore_the_cache(monkeypatch)
    with pytest.raises(
        ExportError, match=r"custom, float32: generation with the cache differs .* nothing was"
    ):
        export(ExportArgs(model=str(best("modern")), format="custom", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_makes_no_sense_is_refused_in_one_line(best, tmp_path, monkeypatch):
    args = {"model": str(best("gpt")), "output": tmp_path / "out"}
    with pytest.raises(InputError, match=r"dtype \(bfloat16\) is for custom and native, not gguf"):
        ExportArgs(**args, format="gguf", dtype="bfloat16")
    with pytest.raises(InputError, match=r"quantization \(q8_0\) is for gguf, not native"):
        ExportArgs(**args, format="native", quantization="q8_0")

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"gguf is not installed; pip install 'tinystories_slm\[export\]'"):
        export(ExportArgs(**args, format="gguf"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_ours_is_refused(best, tmp_path):
    theirs = tmp_path / "theirs"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=288)).save_pretrained(theirs)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (theirs / name).write_bytes((best("gpt") / name).read_bytes())

    with pytest.raises(InputError, match="is a GPT2LMHeadModel, and exports are of models trained here"):
        export(ExportArgs(model=str(theirs), format="native", output=tmp_path / "out"))
