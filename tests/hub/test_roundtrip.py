"""Push with the commands of docs/hub.md, and load in a new process without this package."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub.conftest import TOKEN, complete, hub_connection
from hub.loopback import File, LoopbackHub
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tinystories_slm.commands.generate import generate
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.command_args.publish import PushArgs
from tinystories_slm.config.parse import parse
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.hub.card import write_card
from tinystories_slm.hub.push import push
from tinystories_slm.model_folder import load_model_folder

DOCS = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
TEXT = "Once upon a time the fox saw 3 hens."
NAMES = {"USER": "tester", "NAME": "tales"}


def commands(program: str) -> list[list[str]]:
    """Return the arguments of each command of docs/hub.md that runs `program`, with real names."""
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()
    ]
    lines = [re.sub(r"\b(USER|NAME)\b", lambda name: NAMES[name[0]], line) for line in lines]
    return [shlex.split(line.split(program)[1]) for line in lines if program in line]


class Published:
    """A Hub after the commands of docs/hub.md and one more push."""

    def __init__(self, hub: LoopbackHub, work: Path, run_dir: Path) -> None:
        self.hub, self.work, self.run_dir = hub, work, run_dir
        self.output: list[str] = []
        self.logits: dict[str, torch.Tensor] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a new process on another machine: empty cache, online, without this package."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "TRANSFORMERS"))
        }
        return kept | {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(self.work / "home"),
            "HF_TOKEN": TOKEN,
        }

    def local_logits(self) -> torch.Tensor:
        model, tokenizer = load_model_folder(str(self.run_dir / "best"), device="cpu")
        with torch.no_grad():
            return model(**tokenizer(TEXT, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def published(trained_run, tmp_path_factory):
    work = tmp_path_factory.mktemp("published")
    run_dir = complete(shutil.copytree(trained_run, work / "runs" / "quickstart"))
    scale_up(run_dir)
    with LoopbackHub() as hub:
        published = Published(hub, work, run_dir)
        dry, first, *others = commands("push_to_hub.py")
        script = [sys.executable, str(ROOT / "scripts" / "push_to_hub.py"), *first]
        environment = published.environment | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(script, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        published.output = done.stdout.splitlines()
        published.logits["v1"] = published.local_logits()
        with hub_connection(hub, work / "cache"), contextlib.chdir(work):
            for arguments in (dry, first, *others):
                push(parse(PushArgs, arguments))
            scale_up(run_dir)
            published.logits["main"] = published.local_logits()
            push(PushArgs(run=run_dir, repo_id="tester/tales"))
        yield published


def scale_up(run_dir: Path) -> None:
    """Scale the nearly uniform initial weights, so that the outputs of two models differ clearly."""
    path = run_dir / "best" / "model.safetensors"
    save_file({name: 3 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})


FRESH = """
import json, os, sys
sys.modules["tinystories_slm"] = None  # not installed here
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

text, commit, blocks, best = json.load(sys.stdin)
logits, seen = {}, {}
for revision in ("main", "v1", commit):
    where = {"revision": revision, "cache_dir": f"cache-{revision}"}
    tokenizer = AutoTokenizer.from_pretrained("tester/tales", trust_remote_code=False, **where)
    inputs = tokenizer(text, return_tensors="pt")
    config = AutoConfig.from_pretrained("tester/tales", trust_remote_code=True, **where)
    custom = AutoModelForCausalLM.from_pretrained("tester/tales", trust_remote_code=True, **where)
    native = AutoModelForCausalLM.from_pretrained("tester/tales", subfolder="native", **where)
    base = AutoModel.from_pretrained("tester/tales", trust_remote_code=True, **where)
    with torch.no_grad():
        logits[revision] = {"custom": custom(**inputs).logits, "native": native(**inputs).logits}
        hidden = base(**inputs).last_hidden_state
        assert torch.equal(custom.lm_head(hidden), logits[revision]["custom"])
    seen[revision] = [type(thing).__name__ for thing in (config, custom, native, base)]
    native_tokenizer = AutoTokenizer.from_pretrained("tester/tales", subfolder="native", **where)
    assert native_tokenizer(text).input_ids == inputs.input_ids[0].tolist()
torch.save(logits, "logits.pt")
generate = pipeline("text-generation", model="tester/tales", revision="v1", trust_remote_code=True)
seen["pipeline"] = generate(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
for block in blocks:
    if 'model_id = "."' in block:
        os.chdir(best)
    exec(block, {})
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def fresh(published) -> tuple[dict, dict, list[str]]:
    """Classes and logits in a new process, and the output of the examples in the cards and the docs."""
    repository = published.hub.repositories["tester/tales"]
    blocks = [
        block
        for text in (
            repository.head.files["README.md"].data.decode(),
            published.hub.repositories["tester/PLAIN"].head.files["README.md"].data.decode(),
            DOCS.replace("USER/NAME", "tester/tales").replace("USER/", "tester/"),
            write_card(published.run_dir).read_text(encoding="utf-8"),
        )
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ]
    assert len(blocks) == 5
    elsewhere = published.work / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps([TEXT, repository.tags["v1"], blocks, str(published.run_dir / "best")]),
        cwd=elsewhere, env=published.environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *printed, seen = done.stdout.strip().splitlines()
    return json.loads(seen), torch.load(elsewhere / "logits.pt"), printed


def test_first_push_is_one_commit_with_a_tag(published):
    assert "tag v1" in published.output[-1]
    repository = published.hub.repositories["tester/tales"]
    assert len(repository.commits) == 3 and repository.tags["v1"] != repository.head.oid
    assert published.hub.repositories["tester/HIDDEN"].private
    assert b"license: mit" in published.hub.repositories["tester/HIDDEN"].head.files["README.md"].data


@pytest.mark.parametrize("revision", ["main", "v1", "commit"])
def test_new_process_computes_equal_logits_by_branch_tag_and_commit(published, fresh, revision):
    seen, logits, _ = fresh
    name = published.hub.repositories["tester/tales"].tags["v1"] if revision == "commit" else revision
    expected = published.logits["main" if revision == "main" else "v1"]

    assert seen[name] == [
        "TinyStoriesConfig",
        "TinyStoriesForCausalLM",
        "GPT2LMHeadModel",
        "TinyStoriesModel",
    ]
    assert torch.equal(logits[name]["custom"], expected) and torch.equal(logits[name]["native"], expected)
    assert (published.logits["main"] - published.logits["v1"]).abs().max() > 0.1


def test_pipeline_and_examples_of_cards_and_docs_generate_text(fresh):
    seen, _, printed = fresh
    assert seen["pipeline"].startswith(TEXT)
    assert "\n".join(printed).count("Once upon a time") == 4


def test_every_command_of_the_docs_is_tested_here():
    lines = "".join(re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)).splitlines()
    run_here = ("push_to_hub.py", "generate.py", "evaluate.py", "hf repos tag delete")
    assert len(lines) == sum(len(commands(program)) for program in run_here) == 8


def test_command_of_the_docs_deletes_a_tag(published):
    repository = published.hub.repositories["tester/tales"]
    [arguments] = commands("hf repos tag delete")
    repository.tags[arguments[1]], before = repository.head.oid, repository.tags[arguments[1]]
    command = [str(Path(sys.executable).with_name("hf")), "repos", "tag", "delete", *arguments]
    done = subprocess.run(command, env=published.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert arguments[1] not in repository.tags
    repository.tags[arguments[1]] = before  # for the tests after this one


def test_generate_and_evaluate_accept_a_hub_revision(published, tmp_path):
    [arguments] = commands("generate.py")
    script = [sys.executable, str(ROOT / "scripts" / "generate.py"), *arguments]
    environment = published.environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")

    with hub_connection(published.hub, tmp_path / "cache"):
        assert generate(parse(GenerateArgs, arguments))
        newest = generate(GenerateArgs(model="tester/tales", max_new_tokens=20, seed=0))
        here = generate(GenerateArgs(model=str(published.run_dir / "best"), max_new_tokens=20, seed=0))
        assert [story.text for story in newest] == [story.text for story in here]
        [arguments] = commands("evaluate.py")
        stories = tmp_path / "my_stories.jsonl"
        stories.write_text(json.dumps({"text": "The fox saw 3 hens."}) + "\n")
        with contextlib.chdir(tmp_path):
            first = evaluate(parse(EvaluateArgs, arguments))
        second = evaluate(EvaluateArgs(model="tester/tales", data=str(stories), split="train"))
        assert first["num_stories"] == second["num_stories"] == 1
        assert abs(first["loss"] - second["loss"]) > 0.01


def test_generate_accepts_any_causal_model_of_the_hub(published, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(published.run_dir / "best", trust_remote_code=False)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    files = {path.name: File(path.read_bytes()) for path in (tmp_path / "gpt2").iterdir()}
    published.hub.create("other/gpt2").commit("a model", files)
    with hub_connection(published.hub, tmp_path / "cache"):
        [story] = generate(GenerateArgs(model="other/gpt2", prompt="Once", max_new_tokens=4, seed=0))
        assert story.text.startswith("Once")
        with pytest.raises(UserError, match="other/gpt2"):
            generate(GenerateArgs(model="other/gpt2", revision="v7"))
        with pytest.raises(UserError, match="other/none"):
            generate(GenerateArgs(model="other/none"))


def test_remote_code_runs_only_if_trusted(published, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    best = {
        path.name: File(path.read_bytes())
        for path in (published.run_dir / "best").iterdir()
        if path.is_file()
    }
    config = json.loads(best["config.json"].data) | {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
    }
    code = f"open({str(ran)!r}, 'w').close()\nraise OSError('it ran')\n"
    files = best | {"config.json": File(json.dumps(config).encode()), "strange.py": File(code.encode())}
    published.hub.create("other/strange").commit("a model", files)
    with hub_connection(published.hub, tmp_path / "cache"):
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        for call in (
            lambda **flag: generate(GenerateArgs(model="other/strange", **flag)),
            lambda **flag: evaluate(EvaluateArgs(model="other/strange", data="builtin", **flag)),
        ):
            with pytest.raises(UserError, match="trust_remote_code") as error:
                call()
            assert "\n" not in str(error.value) and not ran.exists()
        with pytest.raises(UserError, match="it ran"):
            generate(GenerateArgs(model="other/strange", trust_remote_code=True))
        assert ran.exists()
