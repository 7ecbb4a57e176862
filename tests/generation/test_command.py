"""scripts/generate.py, in this process but where processes are the point."""

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
from conftest import ROOT, tiny_model
from transformers import PreTrainedTokenizerFast

from tinystories_slm.cli import parse
from tinystories_slm.data.tokenizer import learn_bpe
from tinystories_slm.errors import InputError
from tinystories_slm.evaluation.report import EvaluateArgs
from tinystories_slm.generation.command import GenerateArgs, generate
from tinystories_slm.model_folder import save_model_folder

EOS = "<|endoftext|>"
RULE = "\n\n---\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = learn_bpe(["Once upon a time there was a fox. The fox was happy."] * 3, 280)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=EOS)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    model = tiny_model(vocab_size=len(tokenizer), scale=4.0)
    return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "best")


def script(monkeypatch, capsys, name: str, *args: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a script run in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
    log = logging.getLogger("tinystories_slm")
    handlers, code = list(log.handlers), 0
    try:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    except SystemExit as leave:
        code = leave.code
    log.handlers[:] = handlers  # a script shows its log, which here is for the test alone
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_streamed_or_not_the_same_is_printed_and_written(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The fox\nOnce upon\n")
    settings = {"model": str(folder), "prompts": prompts, "num_stories": 2, "seed": 5, "max_new_tokens": 9}
    printed = {}
    for way in ({"stream": True}, {"batch_size": 16}, {"batch_size": 1}, {"batch_size": 3}):
        output = tmp_path / "stories.jsonl"
        output.write_text("old")
        told = generate(GenerateArgs(**settings, output=output, device="cpu", **way))
        printed[str(way)] = (capsys.readouterr().out, output.read_text())
        assert [(story.prompt, story.seed) for story in told] == [
            ("The fox", 5), ("The fox", 6), ("Once upon", 5), ("Once upon", 6),
        ]  # fmt: skip
    assert len(set(printed.values())) == 1
    assert printed[str(way)][0] == RULE.join(story.text for story in told) + "\n"
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "stories.jsonl"}

    assert lines(output)[1] == {
        "prompt": "The fox",
        "story": told[1].text,
        "model": str(folder),
        "seed": 6,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 9,
        "num_new_tokens": told[1].num_new_tokens,
        "finished": told[1].finished,
    }


def test_a_line_of_the_file_tells_its_story_again(folder, tmp_path):
    output = tmp_path / "stories.jsonl"
    generate(
        GenerateArgs(
            model=str(folder), prompt="Zoë", num_stories=3, temperature=1.1, min_p=0.01,
            repetition_penalty=1.2, output=output,
        )
    )  # fmt: skip
    settings = lines(output)[2]
    again = {key: settings.pop(key) for key in ("story", "num_new_tokens", "finished")}
    [story] = generate(GenerateArgs(**settings))
    assert (story.text, story.num_new_tokens, story.finished) == tuple(again.values())


def test_without_a_seed_one_is_drawn_and_said(folder, caplog, monkeypatch):
    drawn = iter([41, 42])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(drawn))
    first, second = (generate(GenerateArgs(model=str(folder), prompt="A"))[0] for _ in range(2))
    assert (first.seed, second.seed) == (41, 42) and first.text != second.text
    assert "on cpu, seed 41" in caplog.text


def test_switches_stand_alone_or_with_a_value():
    args = parse(GenerateArgs, ["--stream", "--model", "m", "--finish_sentence=false", "--trust_remote_code"])
    assert (args.stream, args.finish_sentence, args.trust_remote_code) == (True, False, True)
    args = parse(GenerateArgs, ["--model", "m", "--stream", "false", "--finish_sentence", "true"])
    assert (args.stream, args.finish_sentence, args.trust_remote_code) == (False, True, False)
    assert parse(EvaluateArgs, ["--trust_remote_code", "--model", "m", "--data", "builtin"]).trust_remote_code
    with pytest.raises(InputError, match="stream is 'maybe', which is no bool"):
        parse(GenerateArgs, ["--model", "m", "--stream", "maybe"])


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["--top_p", "1.5"], b"", "top_p (1.5) must lie in (0, 1]; try 0.95, or 1 to switch it off"),
        (["--num_stories", "0"], b"", "num_stories (0) must be at least 1"),
        (["--batch_size", "0"], b"", "batch_size (0) must be at least 1"),
        (["--max_new_tokens", "-3"], b"", "max_new_tokens (-3) must be at least 1"),
        (["--seed", "-1"], b"", "seed (-1) must lie between 0 and"),
        (
            ["--prompt", "fox " * 60],
            b"",
            "the prompt is 63 tokens long and the model's context is 48; shorten",
        ),
        (["--prompts", "-"], b"A fox\n" + b"fox " * 60, "the prompt is 63 tokens long"),
        (["--prompts", "-"], b"A fox\nZo\xeb", "prompts (standard input) is not valid UTF-8 in line 2"),
        (["--prompts", "-"], b"\n", "prompts (standard input) holds no prompt"),
        (["--prompts", "absent.txt"], b"", "prompts (absent.txt) cannot be read: No such file"),
        (["--prompts", "-", "--prompt", "A"], b"A", "prompt ('A') and prompts (-) are both given; drop one"),
        (["--prompt", "-"], b"A", "for prompts from standard input write --prompts -"),
        (["--prompt", "A \udceb"], b"", "prompt is not valid UTF-8"),
        (["--output", "tests"], b"", "output (tests) is a folder; name a file in it"),
        (["--output", "no/such/x.jsonl"], b"", "lies in no folder that exists; create no/such"),
        (["--device", "tpu"], b"", "device is 'tpu', which is no one of 'auto', 'cpu', 'cuda', 'mps'"),
        (["--model", "absent/absent"], b"", "model 'absent/absent' (revision main) is no folder here"),
    ],
)
def test_what_cannot_be_told_is_one_line_and_exit_code_2(folder, monkeypatch, capsys, args, stdin, message):
    monkeypatch.chdir(ROOT)
    code, out, err = script(monkeypatch, capsys, "generate.py", "--model", folder, *args, stdin=stdin)
    assert (code, out) == (2, "")
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in error and err.rstrip().endswith(error)


def test_a_device_that_is_not_there_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = script(monkeypatch, capsys, "generate.py", "--model", folder, "--device", "cuda")
    assert code == 2 and "error: device (cuda) is not there" in err


def test_bfloat16_tells_too(folder, capsys):
    [story] = generate(GenerateArgs(model=str(folder), dtype="bfloat16", device="cpu", seed=0))
    assert story.text.startswith("Once upon a time") and story.num_new_tokens > 0


@pytest.fixture(scope="module")
def endless(tokenizer, tmp_path_factory) -> Path:
    """A model that never ends a story, with room for a hundred thousand tokens."""
    model = tiny_model(vocab_size=len(tokenizer), family="modern", max_position_embeddings=100_000)
    return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("endless") / "best")


def test_an_interruption_leaves_what_was_written_and_exits_130(endless, tmp_path):
    output = tmp_path / "stories.jsonl"
    output.write_text("old")
    args = ["--model", endless, "--stream", "--max_new_tokens", "90000", "--top_k", "1", "--output", output]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "generate.py"), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd=ROOT,
    )  # fmt: skip
    start = process.stdout.read(10)  # waits until it has begun
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (start + rest).startswith(b"Once upon a ") and b"Traceback" not in err
    assert output.read_text() == "old" and os.listdir(tmp_path) == ["stories.jsonl"]  # no story was whole


def test_a_closed_pipe_ends_it_quietly(endless):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--model", str(endless), "--stream"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    os.close(writer)
    assert done.returncode == 141
    assert [line for line in done.stderr.splitlines() if not line.startswith("model ")] == []


@pytest.fixture
def documents(folder, tmp_path, monkeypatch) -> tuple[Path, dict[str, list[str]]]:
    """(Where to run them, the commands of docs/generation.md by language)."""
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("bash", "python")}
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "best").symlink_to(folder)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A fox"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path, blocks


def test_the_commands_of_the_document_run(documents, folder, monkeypatch, capsys):
    work, blocks = documents
    ours, any_model = ("".join(block).splitlines() for block in blocks["bash"])
    num_stories = []
    for line in ours:
        left, _, command = line.rpartition("| ")
        stdin = subprocess.run(["bash", "-c", left], capture_output=True).stdout if left else None
        program, name, *args = shlex.split(command)
        assert program == "python"
        code, out, err = script(monkeypatch, capsys, Path(name).name, *args, stdin=stdin)
        assert code == 0, err
        num_stories.append(out.count(RULE) + 1)
    assert num_stories == [1, 3, 1, 2, 1, 1]
    assert [line["prompt"] for line in lines(work / "stories.jsonl")] == ["A fox", "An owl"]

    seen = []
    monkeypatch.setattr("tinystories_slm.model_folder.model_commit", lambda *args: seen.append(args))
    for line in any_model:
        _, name, *args = shlex.split(line)
        code, _, err = script(monkeypatch, capsys, Path(name).name, *args)
        assert code == 2 and "model 'USER/NAME' (revision v1) is no folder here" in err
    assert seen == [("USER/NAME", "v1")] * 2


def test_the_python_of_the_document_runs(documents, capsys):
    [code] = documents[1]["python"]
    exec(code, {})
    assert capsys.readouterr().out.count("A fox") == 2
