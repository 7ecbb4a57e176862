"""docs/instruct.md: its commands and its code run as they stand, on a small corpus."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from tinystories_slm.data.chat_template import has_block_template
from tinystories_slm.data.instruct import parse_block
from tinystories_slm.data.tokenizer import load_tokenizer

PAGE = (ROOT / "docs" / "instruct.md").read_text(encoding="utf-8")
SMALL = (
    "--data.max_stories=300", "--tokenizer.vocab_size=400", "--data.seq_len=640", "--train.max_steps=3",
    "--train.warmup_steps=1", "--train.batch_size=2", "--train.eval_stories=3", "--model.num_hidden_layers=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def test_commands_of_the_page_run(work, monkeypatch):
    [commands] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    outputs = []
    for line in commands.splitlines():
        program, script, *args = shlex.split(line)
        assert program == "python"
        if "tinystories-instruct" in args:
            args.append("--print_config")  # it needs the Hub
        elif script == "scripts/train.py":
            args += SMALL
        elif script == "scripts/generate.py":
            args.append("--max_new_tokens=40")
        done = run_script(Path(script).name, *args, cwd=work)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "probably not trained" not in done.stderr
        outputs.append(done.stdout)
    _, words, summary, sentence, scores, config = outputs
    assert has_block_template(load_tokenizer(work / "runs" / "instruct" / "best"))
    block = parse_block(words)
    assert (block.words, block.features) == (("bridge", "honey"), ("MoralValue",))
    assert parse_block(summary).summary.startswith("Tom was afraid of the dark cellar")
    assert sentence.count("Random sentence: They had fun") == 2
    for name in ("words", "sentence", "summary", "dialogue", "moralvalue"):
        assert f"instruct_{name}_real: 1 share" in scores
        assert f"`instruct_{name}" in PAGE
    assert "source: tinystories-instruct" in config


def test_code_of_the_page_runs(work, monkeypatch):
    """After the commands."""
    monkeypatch.chdir(work)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(code.replace("max_new_tokens=320", "max_new_tokens=20"), names)
    tokenizer, labels = names["tokenizer"], names["labels"]
    assert tokenizer.decode([token for token in labels if token >= 0]) == (
        f"\n\n{names['story']}{tokenizer.eos_token}"
    )
    assert tokenizer.decode(names["encoded"]["input_ids"]).startswith("<|endoftext|>Words: bridge, honey\n")
