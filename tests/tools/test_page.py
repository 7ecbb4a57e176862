"""docs/tools.md: its code runs as it stands, on a small model and few tokens."""

import re

import pytest
from conftest import ROOT, tiny_model
from tool_folders import INSTALL

from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.grammar import generate_corpus
from tinystories_slm.model_folder import save_model_folder

PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
SMALL = {
    "d_in=128": "d_in=32",
    "training_tokens=100_000": "training_tokens=1_024",
    "generate_corpus(2_000": "generate_corpus(100",
    "train_batch_size_tokens=1024": "train_batch_size_tokens=128",
}


@pytest.mark.parametrize(
    ("package", "number"), [("transformer_lens.model_bridge", 0), ("sae_lens", 1)], ids=["bridge", "sae"]
)
def test_code_of_the_page_runs(package, number, tmp_path, monkeypatch, capsys):
    pytest.importorskip(package, reason=INSTALL)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.split("## Examples")[1], flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    tokenizer = train_story_tokenizer(list(generate_corpus(20, seed=1)), 300)
    model = tiny_model(
        vocab_size=300, pad_token_id=tokenizer.pad_token_id, family="llama", max_position_embeddings=256
    )
    save_model_folder(model, tokenizer, tmp_path / "runs" / "quickstart" / "best")
    code = blocks[number]
    if number == 1:
        assert all(option in code for option in SMALL)
        for option, smaller in SMALL.items():
            code = code.replace(option, smaller)
    names = {}
    exec(code, names)
    if number == 0:
        assert "torch.Size([1, 4, " in capsys.readouterr().out
    else:
        assert names["sae"].W_enc.shape == (32, 512)
