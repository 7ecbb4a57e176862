"""The page as a Space: its files, and its start where only the listed requirements are installed."""

import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version

import httpx
import pytest
from conftest import started
from demo_client import call, story_text
from hub.loopback import File, LoopbackHub, metadata_of
from packaging.requirements import Requirement

from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.demo.command import demo
from tinystories_slm.errors import UserError
from tinystories_slm.generation import generate_texts

pytest.importorskip("gradio", reason="needs the extra demo")

# Python without .pth files, so without this checkout, that imports only what requirements.txt installs.
RESTRICTED = """
import runpy, sys
from importlib.machinery import PathFinder
from importlib.metadata import distribution, packages_distributions
from packaging.requirements import Requirement

def normalized(name):
    return name.lower().replace("_", "-").replace(".", "-")

allowed, waiting = set(), [Requirement(line.strip()) for line in open("requirements.txt")]
while waiting:
    one = waiting.pop()
    key = (normalized(one.name), frozenset(one.extras))
    if key in allowed:
        continue
    try:
        found = distribution(one.name)
    except Exception:
        continue  # of another system
    allowed.add(key)
    for line in found.requires or []:
        needed = Requirement(line)
        extras = [{"extra": extra} for extra in ("", *one.extras)]
        if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
            waiting.append(needed)
names = {name for name, _ in allowed}
hidden = {
    module for module, owners in packages_distributions().items()
    if not names & {normalized(owner) for owner in owners}
}

class Restricted(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in hidden - {"tinystories_slm"}:
            return None
        return super().find_spec(name, path, target)

assert {"pytest", "textstat", "openai"} <= hidden
sys.meta_path[sys.meta_path.index(PathFinder)] = Restricted
sys.path.insert(0, "")
sys.argv = ["app.py"]
runpy.run_path("app.py", run_name="__main__")
"""


def test_files_of_a_space_name_what_it_needs(tmp_path, capsys):
    folder = tmp_path / "space"
    folder.mkdir()
    demo(DemoArgs(model=["tester/tales", "tester/other"], concurrency=1, export_space=folder))
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(path) for path in folder.iterdir())
    header = metadata_of((folder / "README.md").read_bytes())
    assert header["sdk"] == "gradio" and header["sdk_version"] == version("gradio")
    assert header["app_file"] == "app.py" and header["models"] == ["tester/tales", "tester/other"]
    assert len(header["short_description"]) <= 60 and header["colorFrom"] in ("blue", "red", "yellow")
    app = (folder / "app.py").read_text()
    assert "DemoArgs(model=['tester/tales', 'tester/other'], host='0.0.0.0', concurrency=1)" in app
    lines = (folder / "requirements.txt").read_text().splitlines()
    pinned = {Requirement(line).name: str(Requirement(line).specifier) for line in lines}
    assert pinned["gradio"] == f"=={version('gradio')}" and {"torch", "transformers"} <= set(pinned)
    assert all(re.fullmatch(r"==[\d.a-z]+", one) for one in pinned.values())
    assert not list(folder.rglob("__pycache__"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 5e6


def test_a_folder_is_not_the_model_of_a_space(tmp_path):
    for model in (".", str(tmp_path), "./runs/absent"):
        with pytest.raises(
            UserError, match=r"must be a Hub id for export_space; publish it with push_to_hub"
        ):
            demo(DemoArgs(model=model, export_space=tmp_path / "space"))
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"must be a new or empty folder; use another one"):
        demo(DemoArgs(model="tester/tales", export_space=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_space_starts_with_its_requirements_only_and_loads_from_the_hub(tales, tales_folder, tmp_path):
    space = tmp_path / "space"
    demo(DemoArgs(model="tester/tales", export_space=space))
    with LoopbackHub() as hub:
        files = {
            path.name: File(path.read_bytes(), path.suffix == ".safetensors")
            for path in tales_folder.iterdir()
        }
        for file in files.values():
            hub.large_files[file.sha256] = file.data
        hub.create("tester/tales").commit("model", files)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))} | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": sysconfig.get_path("purelib"),
        }
        command = [sys.executable, "-S", "-c", RESTRICTED]
        with started(
            command, cwd=space, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            address = process.stdout.readline().strip()
            assert address.startswith("http://"), process.stderr.read()
            address = re.sub("0.0.0.0|localhost", "127.0.0.1", address)
            event, data = call(address, "Once upon", 12, 0.8, 50, 0.95, "5")
            assert httpx.get(address).status_code == 200
    assert event == "complete", data
    [expected] = generate_texts(tales.model, tales.tokenizer, ["Once upon"], seed=5, max_new_tokens=12)
    assert story_text(data[-1], tales.tokenizer) == expected
