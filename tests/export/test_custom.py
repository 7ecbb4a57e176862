import os
import subprocess
import sys

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM, TinyStoriesModel

LOAD_WITHOUT_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tinystories_slm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, saved = sys.argv[1:]
trust = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
expected = torch.load(saved)
assert torch.equal(model(expected["input_ids"]).logits, expected["logits"])
assert AutoConfig.from_pretrained(folder, **trust).family == "llama"
assert type(AutoModel.from_pretrained(folder, **trust)).__name__ == "TinyStoriesModel"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
assert tokenizer("fox").input_ids == expected["fox"]
generated = pipeline("text-generation", model=folder, **trust)("A fox", max_new_tokens=5)
assert generated[0]["generated_text"].startswith("A fox")
print("loaded by", type(model).__module__.split(".")[0])
"""


def test_custom_export_loads_with_transformers_alone(exported, original, input_ids, tmp_path):
    family = "llama"
    folder = exported(family, "custom")
    fox = AutoTokenizer.from_pretrained(folder)("fox").input_ids
    saved = {"input_ids": input_ids, "logits": original(family)(input_ids).logits, "fox": fox}
    torch.save(saved, tmp_path / "saved.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, str(folder), str(tmp_path / "saved.pt")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )

    assert done.stdout.strip() == "loaded by transformers_modules", done.stderr


def test_custom_export_needs_no_trust_if_the_package_is_installed(exported, original, input_ids):
    folder = exported("gpt2 with biases", "custom")
    model = AutoModelForCausalLM.from_pretrained(folder)

    assert type(model) is TinyStoriesForCausalLM
    assert type(AutoModel.from_pretrained(folder)) is TinyStoriesModel
    assert torch.equal(model(input_ids).logits, original("gpt2 with biases")(input_ids).logits)
