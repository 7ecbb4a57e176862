"""scripts/generate.py, in this process except for tests of signals and pipes."""

import errno
import io
import json
import logging
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, started, tiny_model
from transformers import PreTrainedTokenizerFast

from tinystories_slm.commands.generate import generate
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.parse import parse
from tinystories_slm.data.chat_template import CHAT_TEMPLATE
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.errors import UserError
from tinystories_slm.generation.prompts import read_prompts
from tinystories_slm.io.atomic import file_sha256
from tinystories_slm.model_folder import load_model_folder, save_model_folder

EOS = "<|endoftext|>"
SEPARATOR = "\n\n---\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = train_bpe(["Once upon a time there was a fox. The fox was happy."] * 3, 280)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=EOS)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    model = tiny_model(vocab_size=len(tokenizer), scale=4.0)
    return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "best")


def run_in_process(
    monkeypatch, capsys, name: str, *args: str, stdin: bytes | None = None
) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a script that runs in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
    log = logging.getLogger("tinystories_slm")
    handlers, code = list(log.handlers), 0
    try:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    except SystemExit as exit_request:
        code = exit_request.code
    log.handlers[:] = handlers  # the script adds a handler, which must not outlive the test
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stream_and_batch_size_do_not_change_the_output(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The fox\nOnce upon\n")
    options = {"model": str(folder), "prompts": prompts, "num_stories": 2, "seed": 5, "max_new_tokens": 9}
    outputs = []
    for mode in ({"stream": True}, {"batch_size": 16}, {"batch_size": 1}, {"batch_size": 3}):
        output = tmp_path / "stories.jsonl"
        output.write_text("old")
        results = generate(GenerateArgs(**options, output=output, device="cpu", **mode))
        outputs.append((capsys.readouterr().out, output.read_text()))
        assert [(result.prompt, result.seed) for result in results] == [
            ("The fox", 5), ("The fox", 6), ("Once upon", 5), ("Once upon", 6),
        ]  # fmt: skip
    assert len(set(outputs)) == 1
    assert outputs[0][0] == SEPARATOR.join(result.text for result in results) + "\n"
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "stories.jsonl"}

    assert read_jsonl(output)[1] == {
        "prompt": "The fox",
        "story": results[1].text,
        "model": str(folder),
        "weights_sha256": file_sha256(folder / "model.safetensors"),
        "seed": 6,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 9,
        "num_new_tokens": results[1].num_new_tokens,
        "finished": results[1].finish_reason == "stop",
    }


def test_options_of_an_output_line_generate_its_text_again(folder, tmp_path):
    output = tmp_path / "stories.jsonl"
    generate(
        GenerateArgs(
            model=str(folder), prompt="Zoë", num_stories=3, temperature=1.1, min_p=0.01,
            repetition_penalty=1.2, output=output,
        )
    )  # fmt: skip
    options = read_jsonl(output)[2]
    expected = {key: options.pop(key) for key in ("story", "num_new_tokens", "finished")}
    del options["weights_sha256"]  # names the weights of `model`, which are the same
    [result] = generate(GenerateArgs(**options))
    assert expected == {
        "story": result.text,
        "num_new_tokens": result.num_new_tokens,
        "finished": result.finish_reason == "stop",
    }


def test_seed_is_random_by_default_and_logged(folder, caplog, monkeypatch):
    seeds = iter([41, 42])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(seeds))
    first, second = (generate(GenerateArgs(model=str(folder), prompt="A"))[0] for _ in range(2))
    assert (first.seed, second.seed) == (41, 42) and first.text != second.text
    assert "on cpu, seed 41" in caplog.text


def test_boolean_flags_accept_an_optional_value():
    args = parse(GenerateArgs, ["--stream", "--model", "m", "--finish_sentence=false", "--trust_remote_code"])
    assert (args.stream, args.finish_sentence, args.trust_remote_code) == (True, False, True)
    args = parse(GenerateArgs, ["--model", "m", "--stream", "false", "--finish_sentence", "true"])
    assert (args.stream, args.finish_sentence, args.trust_remote_code) == (False, True, False)
    assert parse(EvaluateArgs, ["--trust_remote_code", "--model", "m", "--data", "builtin"]).trust_remote_code
    with pytest.raises(UserError, match="stream is 'maybe', which is not of type bool"):
        parse(GenerateArgs, ["--model", "m", "--stream", "maybe"])


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["--top_p", "1.5"], b"", "top_p (1.5) must be in (0, 1]; try 0.95, or 1 to switch it off"),
        (["--num_stories", "0"], b"", "num_stories (0) must be at least 1"),
        (["--batch_size", "0"], b"", "batch_size (0) must be at least 1"),
        (["--max_new_tokens", "-3"], b"", "max_new_tokens (-3) must be at least 1"),
        (["--seed", "-1"], b"", "seed (-1) must be between 0 and"),
        (
            ["--prompt", "fox " * 60],
            b"",
            "the prompt is 63 tokens long and the model's context is 48; shorten",
        ),
        (["--prompts", "-"], b"A fox\n" + b"fox " * 60, "the prompt is 63 tokens long"),
        (["--prompts", "-"], b"A fox\nZo\xeb", "prompts (standard input) is not valid UTF-8 in line 2"),
        (["--prompts", "-"], b"\n", "prompts (standard input) contains no prompt"),
        (["--prompts", "absent.txt"], b"", "prompts (absent.txt) cannot be read: No such file"),
        (["--prompts", "-", "--prompt", "A"], b"A", "prompt ('A') and prompts (-) cannot be combined"),
        (["--prompt", "-"], b"A", "prompt (-) cannot be standard input; use --prompts -"),
        (["--prompt", "A", "--words", "ball"], b"", "words (ball) is a prompt of its own; remove prompt"),
        (["--prompts", "-", "--summary", "A"], b"A", "summary (A) is a prompt of its own; remove prompts"),
        (
            ["--words", "b@ll"],
            b"",
            "words (b@ll) must be letters, with - or ' between them; correct the word",
        ),
        (["--prompt", "A \udceb"], b"", "prompt is not valid UTF-8"),
        (["--output", "tests"], b"", "output (tests) is a folder; set a file path"),
        (["--output", "no/such/x.jsonl"], b"", "its folder does not exist; create no/such"),
        (["--device", "tpu"], b"", "device is 'tpu', which is not one of 'auto', 'cpu', 'cuda', 'mps'"),
        (
            ["--model", "absent/absent"],
            b"",
            "model 'absent/absent' (revision main) is neither a local folder",
        ),
    ],
)
def test_invalid_options_exit_with_code_2_and_one_line(folder, monkeypatch, capsys, args, stdin, message):
    monkeypatch.chdir(ROOT)
    code, out, err = run_in_process(monkeypatch, capsys, "generate.py", "--model", folder, *args, stdin=stdin)
    assert (code, out) == (2, "")
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in error and err.rstrip().endswith(error)


def test_parts_of_a_block_are_the_prompt(folder, tmp_path, caplog):
    """A model of plain stories logs a warning. The default prompt of a model of blocks is that of a block."""
    model, tokenizer = load_model_folder(str(folder), device="cpu")
    for template, default in ((None, "Once upon a time"), (CHAT_TEMPLATE, "Story:")):
        tokenizer.chat_template = template
        options = {"model": str(save_model_folder(model, tokenizer, tmp_path / "best")), "device": "cpu"}
        caplog.clear()
        [result] = generate(GenerateArgs(**options, words="hat, sad", features="Dialogue", max_new_tokens=4))
        assert result.prompt == "Features: Dialogue\nWords: hat, sad\nStory:"
        assert result.text.startswith(result.prompt) and result.num_new_tokens == 4
        warning = "was probably not trained on prompts with words, features"
        assert (warning in caplog.text) == (template is None)
        [result] = generate(GenerateArgs(**options, max_new_tokens=4))
        assert result.prompt == default


def test_unavailable_device_exits_with_code_2(folder, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run_in_process(monkeypatch, capsys, "generate.py", "--model", folder, "--device", "cuda")
    assert code == 2 and "error: device (cuda) is not available" in err


def test_bfloat16_generates_text(folder, capsys):
    [result] = generate(GenerateArgs(model=str(folder), dtype="bfloat16", device="cpu", seed=0))
    assert result.text.startswith("Once upon a time") and result.num_new_tokens > 0


@pytest.fixture(scope="module")
def endless(tokenizer, tmp_path_factory) -> Path:
    """A model with a context of 100,000 tokens that generates no stop token."""
    model = tiny_model(vocab_size=len(tokenizer), family="llama", max_position_embeddings=100_000)
    return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("endless") / "best")


def test_interrupt_exits_with_code_130_and_keeps_the_output_file(endless, tmp_path):
    output = tmp_path / "stories.jsonl"
    output.write_text("old")
    args = ["--model", endless, "--stream", "--max_new_tokens", "90000", "--top_k", "1", "--output", output]
    command = [sys.executable, ROOT / "scripts" / "generate.py", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with started(command, cwd=ROOT, **pipes) as process:
        start = process.stdout.read(10)  # blocks until the model generates
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (start + rest).startswith(b"Once upon a ") and b"Traceback" not in err
    assert output.read_text() == "old" and os.listdir(tmp_path) == ["stories.jsonl"]  # no result


def test_closed_pipe_exits_with_code_141_without_an_error_line(endless):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--model", str(endless), "--stream"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    os.close(writer)
    assert done.returncode == 141
    assert [line for line in done.stderr.splitlines() if not line.startswith("model ")] == []


def test_full_disk_keeps_the_earlier_output(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "stories.jsonl"
    output.write_text("old")
    (tmp_path / "stories.jsonl.partial").symlink_to("/dev/full")
    code, _, err = run_in_process(monkeypatch, capsys, "generate.py", "--model", folder, "--output", output)
    assert code == 2 and err.splitlines()[-1] == (
        f"error: output ({output}) cannot be written to (No space left on device); free disk space"
    )
    assert output.read_text() == "old" and os.listdir(tmp_path) == ["stories.jsonl"]


def test_output_file_has_the_completion_that_stdout_does_not_take(folder, tmp_path, monkeypatch):
    output = tmp_path / "stories.jsonl"

    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.stdout, "write", full)
    with pytest.raises(OSError, match="No space left"):
        generate(GenerateArgs(model=str(folder), prompt="A fox", num_stories=2, batch_size=1, output=output))
    assert [line["prompt"] for line in read_jsonl(output)] == ["A fox"]


def test_requests_are_prepared_in_blocks(folder, tmp_path, monkeypatch):
    """A list of 10^12 requests does not fit into memory; blocks do not change a text."""
    options = {"model": str(folder), "seed": 5, "max_new_tokens": 4, "batch_size": 2, "device": "cpu"}
    whole = generate(GenerateArgs(**options, num_stories=7))
    monkeypatch.setattr("tinystories_slm.commands.generate._BLOCK_SIZE", 3)
    assert generate(GenerateArgs(**options, num_stories=7)) == whole

    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, "write", interrupt)
    output = tmp_path / "stories.jsonl"
    for stream in (False, True):
        with pytest.raises(KeyboardInterrupt):
            generate(GenerateArgs(**options, num_stories=10**12, stream=stream, output=output))


@pytest.mark.parametrize("text", ["[" * 10**5, "1" * 5000, '["' + "[" * 10**5], ids=["deep", "long", "cut"])
def test_json_beyond_the_limits_of_the_reader_is_one_line(tmp_path, text):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^prompts \([^\n]*is not JSON[^\n]*$"):
        read_prompts(path)


def test_a_lone_surrogate_in_a_prompt_is_rejected(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text(r'{"prompt": "A \ud83e fox"}')
    args = ["--model", folder, "--prompts", tmp_path / "prompts.jsonl"]
    code, out, err = run_in_process(monkeypatch, capsys, "generate.py", *args)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: prompts (")
    assert r"line 1, contains an unpaired surrogate (\ud83e); correct the prompt" in err


@pytest.fixture
def doc_examples(folder, tmp_path, monkeypatch) -> tuple[Path, dict[str, list[str]]]:
    """(Working directory, code blocks of docs/generation.md by language)."""
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("bash", "python")}
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "best").symlink_to(folder)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A fox"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path, blocks


def test_commands_of_the_document_run(doc_examples, folder, monkeypatch, capsys):
    work, blocks = doc_examples
    local, hub = ("".join(block).splitlines() for block in blocks["bash"])
    num_stories = []
    for line in local:
        left, _, command = line.rpartition("| ")
        stdin = subprocess.run(["bash", "-c", left], capture_output=True).stdout if left else None
        program, name, *args = shlex.split(command)
        assert program == "python"
        code, out, err = run_in_process(monkeypatch, capsys, Path(name).name, *args, stdin=stdin)
        assert code == 0, err
        num_stories.append(out.count(SEPARATOR) + 1)
    assert num_stories == [1, 3, 1, 2, 1, 1]
    assert [line["prompt"] for line in read_jsonl(work / "stories.jsonl")] == ["A fox", "An owl"]

    calls = []
    monkeypatch.setattr("tinystories_slm.model_folder.resolve_model_commit", lambda *args: calls.append(args))
    for line in hub:
        _, name, *args = shlex.split(line)
        code, _, err = run_in_process(monkeypatch, capsys, Path(name).name, *args)
        assert code == 2 and "model 'USER/NAME' (revision v1) is neither a local folder" in err
    assert calls == [("USER/NAME", "v1")] * 2


def test_python_code_of_the_document_runs(doc_examples, capsys):
    [code] = doc_examples[1]["python"]
    exec(code, {})
    assert capsys.readouterr().out.count("A fox") == 2
