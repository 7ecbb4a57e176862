import re

from conftest import ROOT

from tinystories_slm.export import ExportArgs, export

PAGE = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")


def test_python_examples_of_the_exports_page_run(best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for format in ("native", "gguf"):
        export(ExportArgs(model=str(best("llama")), format=format, output=tmp_path / "exports" / format))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        if "llama_cpp" not in block and "exports/" in block:
            exec(block, {})
    assert "Once upon a time" in capsys.readouterr().out
