"""The serve command: errors before it listens, signals, and the page docs/serving.md."""

import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from conftest import ROOT, tiny_model
from script_process import processes, run_python
from transformers import GPT2Config, GPT2LMHeadModel

from tinystories_slm.commands import COMMANDS
from tinystories_slm.config import parse
from tinystories_slm.config.command_args.serve import ServeArgs
from tinystories_slm.errors import UserError
from tinystories_slm.generation import generate_texts
from tinystories_slm.model_folder import load_model_folder, save_model_folder
from tinystories_slm.serving.server import API_KEY_VARIABLE, serve

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """A model with a context of 20,000 tokens that does not generate the stop token."""
    model = tiny_model(vocab_size=len(tokenizer), family="llama", max_position_embeddings=20_000)
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "best")


@contextmanager
def serve_process(cwd: Path, *args: str, **environment: str) -> Iterator[tuple[object, str]]:
    """Run scripts/serve.py in a process; yield it with the address that it logs."""
    log = cwd / "stderr"
    command = [str(ROOT / "scripts" / "serve.py"), "--port=0", *args]
    outputs = (str(cwd / "stdout"), str(log))
    process = processes.Process(
        target=run_python, args=(command, str(cwd), os.environ | environment, *outputs)
    )
    process.start()
    try:
        for _ in range(6000):
            text = log.read_text() if log.exists() else ""
            if (
                found := re.search(r"serving .* at (http://127\.0\.0\.1:\d+)/v1\n", text)
            ) or process.exitcode:
                break
            time.sleep(0.05)
        assert found, text
        yield process, found[1]
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize(("num_tokens", "timeout_s", "finishes"), [(1500, 60, True), (19_000, 1, False)])
def test_sigterm_finishes_requests_within_the_limit(folder, tmp_path, num_tokens, timeout_s, finishes):
    args = [
        f"--model={folder}",
        "--served_model_name=tiny",
        f"--shutdown_timeout_s={timeout_s}",
        "--num_slots=2",
    ]
    with serve_process(tmp_path, *args) as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        options = {"model": "tiny", "prompt": "A", "seed": 0, "stream": True, "max_tokens": num_tokens}
        stream = iter(client.completions.create(**options))
        first = next(stream)
        os.kill(process.pid, signal.SIGTERM)
        if finishes:
            parts = [first, *stream]
            assert parts[-1].choices[0].finish_reason == "length"
        else:
            with pytest.raises(openai.APIError, match="the server stopped before the text was complete"):
                list(stream)
        process.join(60)
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    log = (tmp_path / "stderr").read_text()
    assert "2 slots of 20000 tokens, 20 MB for keys and values" in log and "Traceback" not in log


def test_commands_and_code_of_the_page_run(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "best").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    [commands] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    install, start = map(shlex.split, commands.splitlines())
    assert install == ["pip", "install", "-e", ".[serve]"] and start[:2] == ["python", "scripts/serve.py"]
    with serve_process(tmp_path, *start[2:], "--num_slots=2") as (_, address):
        exec(code.replace("http://127.0.0.1:8000", address), {})
    model, tokenizer = load_model_folder("runs/quickstart/best", device="cpu")
    [text] = generate_texts(model, tokenizer, ["Once upon a time"], seed=2, max_new_tokens=200)
    assert capsys.readouterr().out == text.removeprefix("Once upon a time")


def test_options_of_the_page_exist():
    options = set(re.findall(r"`--(\w+)", PAGE))
    assert options and options <= set(ServeArgs.__dataclass_fields__)
    assert API_KEY_VARIABLE in PAGE and "serve" in COMMANDS


def test_other_models_are_left_to_transformers_serve(tokenizer, tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(tokenizer), n_positions=8)
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"GPT2LMHeadModel is not a model class.*use `transformers serve [^ ]+`"
    ):
        serve(ServeArgs(model=str(tmp_path)))


def test_slots_beyond_the_memory_are_rejected_with_a_number_that_fits(folder):
    with pytest.raises(UserError, match=r"num_slots \(10000000\): keys and values need 102,400 GB") as caught:
        serve(ServeArgs(model=str(folder), num_slots=10**7, device="cpu"))
    assert 10 < int(re.search(r"use at most (\d+)", str(caught.value))[1]) < 10**6


def test_an_address_in_use_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port \({port}\): cannot listen \(.*\); use another port, or 0"
        ):
            serve(ServeArgs(model=str(folder), port=port, num_slots=1, device="cpu"))
    with pytest.raises(UserError, match=r"host \(192\.0\.2\.1\) and port \(0\): cannot listen"):
        serve(ServeArgs(model=str(folder), host="192.0.2.1", port=0, num_slots=1, device="cpu"))


def test_missing_packages_and_an_empty_key_are_user_errors(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv(API_KEY_VARIABLE, " ")
        with pytest.raises(UserError, match=f"{API_KEY_VARIABLE} .*must not be empty; set a key or unset"):
            serve(ServeArgs(model=str(folder)))
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(
        UserError, match=r"starlette is not installed; pip install 'tinystories_slm\[serve\]'"
    ):
        serve(ServeArgs(model=str(folder)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num_slots=0"], "num_slots (0) must be at least 1"),
        (["--max_waiting=0"], "max_waiting (0) must be at least 1"),
        (["--max_tokens=0"], "max_tokens (0) must be at least 1"),
        (["--port=70000"], "port (70000) must be between 0 and 65535"),
        (["--backend=hf"], "backend (hf): cannot add requests to a running batch; use auto"),
        (["--served_model_name="], "served_model_name ('') must not be empty"),
    ],
)
def test_invalid_options_are_rejected(args, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(ServeArgs, ["--model=m", *args])


def test_the_cache_is_allocated_once(folder):
    """Memory of keys and values does not grow with requests: it is one tensor per layer and kind."""
    from tinystories_slm.serving.server import _build_batch, _warm_up

    model, _ = load_model_folder(str(folder), device="cpu")
    batch = _build_batch(ServeArgs(model=str(folder), num_slots=3), model, [])
    before = [layer.keys.data_ptr() for layer in batch.decoder.layers]
    _warm_up(batch, [1, 2])
    assert batch.num_free_slots == 3
    assert [layer.keys.data_ptr() for layer in batch.decoder.layers] == before
    assert all(layer.keys.dtype == torch.float32 for layer in batch.decoder.layers)
