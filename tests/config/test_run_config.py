import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import (
    ModelArgs,
    RunConfig,
    TrainArgs,
    flatten,
    load_config,
    parse,
    parse_config,
    save_config,
)
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.config_file import is_misread_number
from tinystories_slm.errors import UserError
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig


def test_flags_override_files_and_later_files_earlier_ones(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("output_dir: runs/a\ntrain:\n  lr: 6e-4\n  max_steps: 500\n")
    b.write_text("train:\n  max_steps: 700\n  warmup_steps: 7\n")
    config = parse_config(["--train.warmup_steps", "9", "--config", str(a), f"--config={b}"])

    assert config.output_dir == Path("runs/a")
    assert (config.train.lr, config.train.max_steps, config.train.warmup_steps) == (6e-4, 700, 9)
    assert config.train.batch_size == TrainArgs().batch_size


@given(
    lr=st.floats(1e-6, 1.0),
    steps=st.integers(2, 10**6),
    max_stories=st.none() | st.integers(1, 10**6),
    revision=st.none() | st.text("abcdef0123456789", min_size=1),
    text_column=st.text("abc: #'\"-é", min_size=1),
    family=st.sampled_from(["gpt2", "llama"]),
)
def test_a_saved_configuration_loads_back_equal(
    tmp_path_factory, lr, steps, max_stories, revision, text_column, family
):
    plain = RunConfig()
    config = dataclasses.replace(
        plain,
        data=dataclasses.replace(
            plain.data, max_stories=max_stories, revision=revision, text_column=text_column
        ),
        model=dataclasses.replace(plain.model, family=family),
        train=dataclasses.replace(plain.train, lr=lr, max_steps=steps, warmup_steps=1),
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)

    assert load_config(path) == config


def test_every_model_knob_is_a_field_of_the_architecture():
    # PreTrainedConfig keeps any unknown name silently, so a knob misspelt here would do nothing.
    fields = {field.name for field in dataclasses.fields(TinyStoriesConfig)} | {"rope_theta"}
    assert {field.name for field in dataclasses.fields(ModelArgs)} - {"init_from"} <= fields
    config = parse_config(["--model.family", "llama", "--model.rope_theta", "500"])
    assert config.model_config(vocab_size=300).rope_parameters["rope_theta"] == 500


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.learning_rate", "1"], ["train.learning_rate", "train.lr"]),
        (["--lr", "1"], ["'lr'", "did you mean train.lr"]),
        (["--train.max_steps", "many"], ["train.max_steps", "'many'", "int"]),
        (["--train.max_steps", "1.5"], ["train.max_steps", "1.5", "int"]),
        (["--data.max_stories", "some"], ["data.max_stories", "'some'", "int", "null"]),
        (["--train.compile", "perhaps"], ["train.compile", "perhaps", "bool", "auto"]),
        (["--train.mixed_precision", "bf8"], ["train.mixed_precision", "bf8", "'bf16'"]),
        (["--train.warmup_steps", "2000"], ["train.warmup_steps (2000)", "train.max_steps (2000)"]),
        (["--train.min_lr_rate", "5"], ["train.min_lr_rate (5.0)", "never above the peak"]),
        (["--train.min_lr_rate", "nan"], ["train.min_lr_rate", "nan"]),
        (["--train.decay_fraction", "0"], ["train.decay_fraction (0.0)", "0.2"]),
        (["--train.decay_fraction", "1.1"], ["train.decay_fraction (1.1)", "at most 1"]),
        (["--train.schedule", "step"], ["train.schedule", "step", "'wsd'"]),
        (["--train.ema_decay", "1"], ["train.ema_decay (1.0)", "0.99", "null"]),
        (["--train.lr", "0"], ["train.lr (0.0)", "1e-3"]),
        (["--train.lr", "nan"], ["train.lr", "nan"]),
        (["--train.lr", "inf"], ["train.lr", "inf"]),
        (["--model.hidden_size", "100"], ["hidden_size (100)", "num_attention_heads (8)"]),
        (["--model.qk_norm", "true"], ["qk_norm", "family=llama"]),
        (
            ["--train.batch_size", "63", "--train.per_device_batch_size", "16"],
            ["train.batch_size (63)", "per_device_batch_size (16)"],
        ),
        (["--train.per_device_batch_size", "0"], ["train.per_device_batch_size (0)", "at least 1"]),
        (["--data.seq_len", "1"], ["data.seq_len (1)", "at least 2"]),
        (["--data.validation_fraction", "1.5"], ["data.validation_fraction (1.5)", "0.05"]),
        (["--tokenizer.vocab_size", "100"], ["tokenizer.vocab_size (100)", "257"]),
        (
            ["--tokenizer.vocab_size", "70000", "--data.token_dtype", "uint16"],
            ["tokenizer.vocab_size (70000)", "data.token_dtype (uint16", "uint32 or auto"],
        ),
        (["--config", "absent.yaml"], ["absent.yaml", "not exist"]),
        (["--train.max_step", "500"], ["train.max_step", "train.max_steps"]),
        (["--train.seed", "4294967296"], ["train.seed (4294967296)"]),
        (["--model.intermediate_size", "-5"], ["intermediate_size (-5)"]),
        (["--model.initializer_range", "-1"], ["initializer_range (-1.0)"]),
        (["--model.family", "llama", "--model.rope_theta", "0"], ["rope_theta (0.0)"]),
        (["--tokenizer.vocab_size", "1000000000000"], ["tokenizer.vocab_size (1000000000000)"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_invalid_value_is_rejected_in_one_line_that_names_it(argv, parts):
    with pytest.raises(UserError) as refusal:
        parse_config(argv)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("train:\n  learning_rate: 1\n", ["train.learning_rate", "train.lr"]),
        ("trian:\n  lr: 1\n", ["trian.lr", "did you mean train.lr"]),
        ("train:\n  lr: fast\n", ["train.lr", "'fast'", "float"]),
        ("train: [1\n", ["config"]),
        ("train: 3\n", ["train"]),
        ("train:\n  lr: null\n", ["lr"]),
        ("", ["config"]),
    ],
)
def test_a_bad_file_is_rejected_in_one_line(tmp_path, yaml, parts):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml)
    with pytest.raises(UserError) as refusal:
        parse_config(["--config", str(path)])
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


def test_a_binary_file_is_rejected_in_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"output_dir: \xff\xfe\n")
    with pytest.raises(UserError) as refusal:
        parse_config(["--config", str(path)])
    assert "\n" not in str(refusal.value)


def test_several_faults_are_reported_together():
    with pytest.raises(UserError, match=r"train.lr \(-1.0\).*train.batch_size \(63\)"):
        parse_config(["--train.lr", "-1", "--train.batch_size", "63", "--train.per_device_batch_size", "16"])


def test_a_script_rejects_with_exit_code_2_and_no_traceback():
    done = run_script("train.py", "--config", "configs/debug.yaml", "--train.warmup_steps", "5000")

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: train.warmup_steps (5000)")
    assert done.stderr.count("\n") == 1


def test_print_config_rejects_values_as_a_run_does():
    done = run_script("train.py", "--train.batch_size=7", "--train.per_device_batch_size=2", "--print_config")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train.batch_size (7) must be a multiple")


def test_print_config_is_a_file_that_loads(tmp_path):
    done = run_script("train.py", "--config", "configs/9m.yaml", "--train.lr", "0.125", "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)

    assert done.returncode == 0
    assert load_config(path) == parse_config(["--config", "configs/9m.yaml", "--train.lr", "0.125"])


@pytest.mark.parametrize(
    "script",
    sorted(path.name for path in (ROOT / "scripts").glob("*.py")),
)
def test_help_states_defaults_and_units(script):
    done = run_script(script, "--help")

    assert done.returncode == 0
    assert "default: " in done.stdout
    expected = {
        "generate.py": "Maximum number of new tokens",
        "evaluate.py": "Number of stories to score",
        "report.py": "Run directory",
        "export.py": "Type of the weights in `gguf`",
        "push_to_hub.py": "List every file with its size",
        "inspect_data.py": "Optimizer step, from 1",
        "surprisal.py": "Number of stories to score",
        "exposure.py": "Other fillings with which",
        "report_card.py": "Sample from the top_k most probable tokens",
        "demo.py": "Largest length that a visitor can set, in new tokens",
        "serve.py": "Completions that are generated at the same time",
        "scaling.py": "largest budget (parameters times tokens)",
        "sweep.py": "Windows per forward pass",
    }
    assert expected.get(script, "Optimizer steps of linear warm-up") in " ".join(done.stdout.split())


TEXTS = [
    "# one",
    "~",
    "&amp",
    "*a",
    "[x",
    "{",
    "1e3",
    "true",
    "- a",
    "a: b",
    "'",
    '"',
    "\\",
    "\n",
    "é 🦊",
    "\u2028",
    "\x7f\x85",
    "",
]


@pytest.mark.parametrize("text", [*TEXTS, "null"])
@pytest.mark.parametrize("form", ["=", " "])
def test_an_optional_string_is_taken_as_typed(text, form):
    argv = ["--model=m", f"--prompt={text}"] if form == "=" else ["--model=m", "--prompt", text]
    assert parse(GenerateArgs, argv).prompt == text


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))  # no argument can hold NUL
def test_any_text_is_a_prompt(text):
    assert parse(GenerateArgs, ["--model=m", f"--prompt={text}"]).prompt == text if text != "-" else True


def test_null_resets_an_option_of_a_run(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  init_from: somewhere\n")
    assert parse_config(["--config", str(path)]).model.init_from == "somewhere"
    assert parse_config(["--config", str(path), "--model.init_from", "null"]).model.init_from is None
    assert parse_config(["--data.revision", "5e8"]).data.revision == "5e8"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train:\n  lr: 1\ndata:\n  seq_len: 64\ntrain:\n  max_steps: 5\n", r"line 5: train occurs twice"),
        ("train:\n  lr: 1e-3\n  max_steps: 9\n  lr: 2e-3\n", r"line 4: train\.lr occurs twice"),
        ("train:\n  max_steps: 0200\n", r"line 2: train\.max_steps \(0200\) must be a decimal integer"),
        ("train:\n  max_steps: 1:30\n", r"train\.max_steps \(1:30\) must be a decimal integer"),
        ("train:\n  weight_decay: .nan\n", r"train\.weight_decay \(nan\) must be at least 0"),
        ('output_dir: ""\n', r"output_dir \(\.\): must name a folder"),
        ("data:\n  data_dir: ''\n", r"line 2: data\.data_dir \(\.\): must name a folder or file"),
        ("train: {lr: 0.1, lr: 0.1}\n", r"line 1: train\.lr occurs twice; remove one$"),
        ("x:\n  - {a: 1}\n  - {a: 1, a: 2}\n", r"line 3: x\[1\]\.a occurs twice"),
        ("train:\n  max_steps: '0200'\n", r"train\.max_steps \(0200\) must be a decimal integer"),
        ("train:\n  max_steps: !!int '1:30'\n", r"train\.max_steps \(1:30\) must be a decimal integer"),
        ("train:\n  max_steps: 0x10\n", r"train\.max_steps \(0x10\) must be a decimal integer"),
        (
            "train:\n  max_minutes: 1:30.5\n",
            r"train\.max_minutes \(1:30\.5\) must be a decimal integer or frac",
        ),
        ("train:\n  lr: 1_0.5\n", r"train\.lr \(1_0\.5\) must be a decimal integer or fraction"),
        ("train:\n  weight_decay: .inf\n", r"train\.weight_decay \(inf\) must be a finite number"),
        ("train:\n  max_grad_norm: .inf\n", r"train\.max_grad_norm \(inf\) must be a finite number"),
        ("model:\n  rope_theta: -.inf\n", r"model\.rope_theta \(-inf\) must be a finite number"),
        ("model:\n  dropout: .nan\n", r"^model: dropout \(nan\) must be in \[0, 1\)$"),
        ("", r"config\.yaml: must hold options, as configs/9m\.yaml does; write them, or remove --config$"),
        ("# max_steps: 5\n---\n", r"config\.yaml: must hold options"),
        ("- train\n", r"config\.yaml: must hold options"),
        ("train:\n", r"config\.yaml: train must have a value; write options below it, or remove it"),
        ("a: &a\n  b: *a\n", r"an alias \(\*\) refers to itself"),
        ("x: " + "[" * 5000, r"config\.yaml: is nested too deeply"),
        ("? [a, b]\n: 1\n", r"line 1: a section must have names as keys"),
    ],
)
def test_yaml_that_would_be_misread_is_rejected(tmp_path, yaml, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    with pytest.raises(UserError, match=message) as error:
        parse_config(["--config", str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.max_minutes=1:30"], r"train\.max_minutes \(1:30\): must be a decimal integer or fraction"),
        (["--train.max_steps", "0x10"], r"train\.max_steps \(0x10\): must be a decimal integer or fraction"),
        (["--train.weight_decay=.inf"], r"train\.weight_decay \(inf\) must be a finite number"),
        (["--output_dir="], r"output_dir \(\.\): must name a folder or file; write its path"),
        (["--data.data_dir", ""], r"data\.data_dir \(\.\): must name a folder or file; write its path"),
    ],
)
def test_flags_that_would_be_misread_are_rejected(argv, message):
    with pytest.raises(UserError, match=message):
        parse_config(argv)


@given(number=st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_no_decimal_number_counts_as_misread(number):
    assert not is_misread_number(str(number)) and not is_misread_number(f"+{abs(number)}")


@pytest.mark.parametrize("text", ["# one", "~", "&amp"])
def test_an_optional_path_is_taken_as_typed(text, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    expected = tmp_path / "me" if text == "~" else Path(text)
    assert parse(GenerateArgs, ["--model=m", f"--output={text}"]).output == expected
    assert parse(GenerateArgs, ["--model=m", "--prompts", text]).prompts == expected
    assert parse(GenerateArgs, ["--model=m", "--output=null"]).output is None


@pytest.mark.parametrize("text", ["010", "1:30", "0200"])
def test_an_integer_flag_is_decimal(text):
    with pytest.raises(UserError, match=rf"train\.max_steps \({text}\): must be a decimal integer"):
        parse_config(["--train.max_steps", text])


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(["--output_dir=~/run", "--data.data_dir=~/data"])
    assert (config.output_dir, config.data.data_dir) == (tmp_path / "run", tmp_path / "data")
    (tmp_path / "out").mkdir()
    assert parse(GenerateArgs, ["--model=m", "--output=~/out/a.jsonl"]).output == tmp_path / "out" / "a.jsonl"


def test_flatten_joins_nested_keys():
    assert flatten({"a": 1, "b": {"c": None, "d": {"e": "x"}}}) == {"a": 1, "b.c": None, "b.d.e": "x"}
