import io
import os
import sys
from pathlib import Path

import pytest

from tinystories_slm.errors import UserError
from tinystories_slm.generation.prompts import block_prompt, read_prompts


def test_text_file_has_one_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffOnce upon\r\n\n \nZoë \u2028 saw \n last".encode())
    assert read_prompts(path) == ["Once upon", "Zoë \u2028 saw ", " last"]


def test_jsonl_prompt_may_contain_line_breaks(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Once\\nupon", "else": 1}\n\n{"prompt": ""}\n')
    assert read_prompts(path) == ["Once\nupon", ""]


def test_suffix_of_a_json_file_may_be_upper_case(tmp_path):
    path = tmp_path / "UPPER.JSONL"
    path.write_text('{"prompt": "Ana had"}\n"Bo had"\n')
    assert read_prompts(path) == ["Ana had", "Bo had"]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ('[\n {\n  "prompt": "Ana had"\n },\n {\n  "prompt": "Bo had"\n }\n]', ["Ana had", "Bo had"]),
        ('\ufeff["Ana had", ""]\n', ["Ana had", ""]),
        ('{\n "prompt": "Ana had"\n}', ["Ana had"]),
        ('{"prompt": "Ana had"}\n\n{"prompt": "Bo had"}\n', ["Ana had", "Bo had"]),
    ],
)
def test_json_file_holds_a_list_or_lines(tmp_path, content, prompts):
    path = tmp_path / "prompts.json"
    path.write_text(content, encoding="utf-8")
    assert read_prompts(path) == prompts


def test_dash_reads_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Zoë\nA fox\n".encode())))
    assert read_prompts(Path("-")) == ["Zoë", "A fox"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", r"p.txt\) contains no prompt; write one per line"),
        ("p.txt", b" \n\n", "contains no prompt"),
        ("p.txt", b"fine\nZo\xeb\n", "is not valid UTF-8 in line 2"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt"\n',
            'line 2, is not JSON .*; write {"prompt": "Once upon a time"}',
        ),
        ("p.jsonl", b'{"story": "a"}', 'line 1, has no "prompt"'),
        ("p.jsonl", b'["a"]', 'line 1, has no "prompt"'),
        ("p.jsonl", b'{"prompt": 3}', "line 1, has a prompt that is not a string: 3; write {"),
        (
            "p.JSONL",
            b'{"prompt": "Ana \\ud83d found"}',
            r"line 1, contains an unpaired surrogate \(\\ud83d\)",
        ),
        ("p.json", b'["a",\n{"story": "b"}]', 'item 2, has no "prompt"'),
        ("p.json", b'["a",\n3]', 'item 2, has no "prompt"'),
        ("p.json", b'["a",\n"b', r'line 2, is not JSON .*; write \[{"prompt"'),
        ("p.json", b"[]", "contains no prompt"),
        ("absent.txt", None, "cannot be read: No such file"),
        ("folder", None, "cannot be read: Is a directory"),
    ],
)
def test_invalid_prompt_file_raises_a_one_line_error(tmp_path, name, content, message):
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_named_pipe_is_an_error_and_a_descriptor_is_read(tmp_path):
    os.mkfifo(tmp_path / "prompts")
    with pytest.raises(UserError, match=r"prompts \(.*\): must not be a named pipe; use a file"):
        read_prompts(tmp_path / "prompts")
    reader, writer = os.pipe()  # as `<(command)` of a shell
    os.write(writer, b"One\nTwo\n")
    os.close(writer)
    assert read_prompts(Path(f"/dev/fd/{reader}")) == ["One", "Two"]
    os.close(reader)


def test_parts_of_a_block_become_its_prompt():
    options = {
        "words": "ball,sad , ice-cream",
        "features": "Dialogue, BadEnding",
        "summary": " Tom ran\nand sat. ",
        "random_sentence": 'He said, "Zoë\'s hat."',
    }
    assert block_prompt(options) == (
        "Features: Dialogue, BadEnding\nWords: ball, sad, ice-cream\nSummary: Tom ran and sat.\n"
        'Random sentence: He said, "Zoë\'s hat."\nStory:'
    )
    assert block_prompt({"words": "Zoë"}) == "Words: Zoë\nStory:"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("words", "", r'^words \(\) must have text around each comma; use "ball, sad"$'),
        ("words", "ball,,sad", "text around each comma"),
        ("words", "ball, ", "text around each comma"),
        ("words", "b@ll", r"^words \(b@ll\) must be letters, with - or ' between them; correct the word$"),
        ("words", "ball sad", "words .ball sad. must be letters"),
        ("words", "ball\nStory:", "must be letters"),
        ("words", "\udceb", "must be letters"),
        ("features", "dialogue", "^features .dialogue. must be among BadEnding, Conflict, Dialogue, Foresh"),
        ("features", " ", r'use "Dialogue, Twist"$'),
        ("summary", " \n", r"^summary \(' \\n'\) must not be empty; write a sentence or omit it$"),
        ("random_sentence", "", "must not be empty"),
        ("summary", "A \udceb", "^summary is not valid UTF-8"),
    ],
)
def test_faulty_parts_of_a_block_are_rejected(name, value, message):
    with pytest.raises(UserError, match=message):
        block_prompt({name: value})
