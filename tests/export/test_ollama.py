import re

import pytest
from conftest import tiny_model
from transformers import AutoTokenizer

from tinystories_slm.data.chat_template import CHAT_TEMPLATE
from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.export import ExportArgs, export
from tinystories_slm.model_folder import save_model_folder

VOCAB_SIZE = 288


def parse(text: str) -> dict[str, str]:
    """Parse the instructions of a Modelfile, each `NAME value`, or a value in three quotation marks."""
    found = re.findall(r'^([A-Z]+) (?:"""(.*?)"""|([^\n]*))$', text, flags=re.MULTILINE | re.DOTALL)
    entries = [(name, multiline or line) for name, multiline, line in found]
    parameters = [value.split(maxsplit=1) for name, value in entries if name == "PARAMETER"]
    return dict(entry for entry in entries if entry[0] != "PARAMETER") | dict(parameters)


@pytest.mark.parametrize("is_instruct", [False, True])
def test_modelfile_has_prompt_stop_and_sampling(is_instruct, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'tinystories_slm[export]'")
    tokenizer = train_story_tokenizer(["Words: fox\nStory:\n\nOnce upon a time, a fox ran."] * 5, VOCAB_SIZE)
    if is_instruct:
        tokenizer.chat_template = CHAT_TEMPLATE
    save_model_folder(tiny_model(vocab_size=VOCAB_SIZE), tokenizer, tmp_path / "best")
    folder = export(ExportArgs(model=str(tmp_path / "best"), format="gguf", output=tmp_path / "gguf"))

    entries = parse((folder / "Modelfile").read_text())
    template = entries.pop("TEMPLATE")
    assert entries == {
        "FROM": "./model.gguf",
        "temperature": "0.8",
        "top_k": "50",
        "top_p": "0.95",
        "num_ctx": "48",
        "num_predict": "48",
        "stop": '"<|endoftext|>"',
    }
    assert (folder / entries["FROM"]).is_file()
    # The tokenizer adds the start token to the rendered prompt, as the GGUF file does.
    prompt = "Words: fox" if is_instruct else "Once upon a time"
    ids = AutoTokenizer.from_pretrained(folder)(template.replace("{{ .Prompt }}", prompt)).input_ids
    if is_instruct:
        message = [{"role": "user", "content": prompt}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        assert ids == chat["input_ids"]
    else:
        assert ids == tokenizer(prompt).input_ids
