"""The demo command: its options, errors, and the commands of docs/demo.md."""

import importlib.util
import re
import shlex
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT, run_script

from tinystories_slm.commands import run
from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.demo import command
from tinystories_slm.demo.command import demo, find_report_cards
from tinystories_slm.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, r"model \(\): must name a model; set --model RUN/best or a Hub id"),
        ({"model": []}, r"model \(\): must name a model"),
        ({"concurrency": 0}, r"concurrency \(0\) must be at least 1"),
        ({"port": 70000}, r"port \(70000\): must be between 1 and 65535; use 7860"),
        ({"report_card": "absent.html"}, r"report_card \(absent.html\) does not exist; write it with"),
        ({"votes": "absent/votes.jsonl"}, r"votes \(absent/votes.jsonl\) is in a folder that does not exist"),
    ],
)
def test_options_out_of_range_are_rejected(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {name: Path(value) for name, value in options.items() if name in ("report_card", "votes")}
    with pytest.raises(UserError, match=message):
        DemoArgs(**({"model": "tales"} | options | paths))


def test_script_ends_with_one_line_for_an_empty_or_missing_model(tmp_path):
    for model, message in (
        ("", "error: model (): must name a model"),
        ("./absent", "error: model './absent' is not"),
    ):
        done = run_script("demo.py", f"--model={model}")
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(message), done.stderr


def test_missing_gradio_is_one_line(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "gradio" else find_spec(name))
    with pytest.raises(UserError, match=r"^gradio is not installed; pip install 'tinystories_slm\[demo\]'$"):
        demo(DemoArgs(model="absent"))


def test_model_is_not_shown_twice(tales_folder):
    with pytest.raises(UserError, match=r"model \(.*\): must differ from the other models; remove it"):
        command.load_models(DemoArgs(model=[str(tales_folder)] * 2))


def test_report_cards_of_folders_and_runs_are_found(tmp_path):
    for run_name in ("a", "b"):
        (tmp_path / run_name / "best").mkdir(parents=True)
    models = [str(tmp_path / "a" / "best"), str(tmp_path / "b" / "best"), "tester/tales"]
    assert find_report_cards(DemoArgs(model=models)) == []
    of_run = tmp_path / "a" / "report_card.html"
    of_folder, named = tmp_path / "b" / "best" / "report_card.html", tmp_path / "card.html"
    for path in (of_run, of_folder, named):
        path.touch()
    assert find_report_cards(DemoArgs(model=models)) == [of_run, of_folder]
    assert find_report_cards(DemoArgs(model=models, report_card=named)) == [named]


@pytest.fixture
def no_wait(monkeypatch):
    """Let the command end when the page is served; close the page and restore the threads of torch."""
    gradio = pytest.importorskip("gradio", reason="needs the extra demo")
    threads = torch.get_num_threads()
    monkeypatch.setattr(command, "_wait_for_signal", lambda: None)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.callback(gradio.close_all)
        yield


def test_port_in_use_is_one_line(no_wait, tales_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^host, port \(127.0.0.1, {port}\): cannot be used"):
            demo(DemoArgs(model=str(tales_folder), port=port))


def test_commands_of_the_document_run(no_wait, tales_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "other"):
        shutil.copytree(tales_folder, tmp_path / "runs" / name / "best")
    text = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    commands = [shlex.split(line)[2:] for line in lines if "scripts/demo.py" in line]
    assert len(commands) == 3
    for number, arguments in enumerate(commands):
        run("demo", arguments)
        printed = capsys.readouterr().out.split()
        if number < 2:
            [address] = printed
            assert address.startswith("http://127.0.0.1:")
            assert httpx.get(address).status_code == 200
    assert (tmp_path / "space" / "app.py").is_file()
    assert "USER/NAME" in (tmp_path / "space" / "app.py").read_text()
