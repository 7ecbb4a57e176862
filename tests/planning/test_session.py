"""Plans of the commands: with simulated speeds, what is chosen, recorded, resumed and rejected."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
from conftest import ROOT
from training.helpers import send_signals

from tinystories_slm.commands import run
from tinystories_slm.commands.story import run_story
from tinystories_slm.commands.train import run_train
from tinystories_slm.config import RunConfig, load_config, parse
from tinystories_slm.config.command_args.run import StoryArgs, TrainCommandArgs
from tinystories_slm.config.parse import given_options
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.planning import session
from tinystories_slm.planning.choice import Measurement
from tinystories_slm.planning.law import LAW_FILE, load_law
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training import train


def fake_machine(tokens_per_second: float):
    """A function like `measure`, of a machine with this speed at 2 x 64."""

    def measure(config: RunConfig) -> Measurement:
        layers, width = config.model.num_hidden_layers, config.model.hidden_size
        size = 12 * layers * width**2
        return Measurement(size, tokens_per_second * 3e6 / (2.4e6 + 6 * size), 8e8)

    return measure


def plan_again(*flags: str, minutes: float, law_file: Path | None = None) -> RunConfig:
    config, given = parse(RunConfig, flags), given_options(RunConfig, flags)
    return session.plan_config(config, given, minutes, law_file=law_file)


def own_law(name: str, **changes) -> Path:
    """Write the package's law of stories to mine.json as `name`, with changes."""
    record = json.loads(LAW_FILE.read_text())["stories"] | changes
    Path("mine.json").write_text(json.dumps({name: record}))
    return Path("mine.json")


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A function from flags to the planned configuration, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "_process_age_s", lambda: 0.0)

    def configure(
        *flags: str, speed: float = 40_000, minutes: float = 10, law_file: Path | None = None
    ) -> RunConfig:
        monkeypatch.setattr(session, "measure", fake_machine(speed))
        return plan_again(*flags, minutes=minutes, law_file=law_file)

    return configure


@pytest.mark.parametrize("speed", [10_000, 40_000, 4_000_000])
def test_plan_of_slow_and_fast_machines(speed, plan, caplog):
    config = plan("--output_dir=runs/planned", speed=speed)
    record = json.loads(RunDir(config.output_dir).plan.read_text())

    assert config.train.max_minutes == pytest.approx(10, abs=0.05)
    assert config.tokenizer.vocab_size == 2048  # of the built-in corpus
    assert record["options"]["model.hidden_size"] == config.model.hidden_size
    assert record["bits_per_byte"] == min(one["bits_per_byte"] for one in record["candidates"])
    assert config.data.max_stories >= record["num_steps"] * config.train.batch_size * 256 * 3.85 / 816
    log = "\n".join(caplog.messages)
    assert f"{config.model.num_hidden_layers} layers x {config.model.hidden_size}, vocabulary 2,048" in log
    assert f"expected: {record['bits_per_byte']:.3f} bits per byte of held-out text" in log
    assert f"{config.model.num_hidden_layers} x {config.model.hidden_size}: " in log and "(chosen)" in log
    assert speed < 1e6 or "times the largest" in log


def test_given_options_of_flags_and_files_stay(plan, tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  lr: 0.02\nmodel:\n  hidden_size: 128\n")
    flags = ("--config=mine.yaml", "--tokenizer.vocab_size", "700", "--data.max_stories=5000")
    config = plan(*flags)

    assert (config.train.lr, config.model.hidden_size) == (0.02, 128)
    assert (config.tokenizer.vocab_size, config.data.max_stories) == (700, 5000)
    assert config.train.optimizer == "muon"  # not given


def test_own_law_plans_the_run(plan, tmp_path):
    law_file = own_law("builtin", vocab_size=700, irreducible={"value": 2.0})
    config = plan("--output_dir=runs/planned", law_file=law_file)

    assert config.tokenizer.vocab_size == 700
    assert json.loads(RunDir(config.output_dir).plan.read_text())["bits_per_byte"] > 2.0


def test_stories_of_a_file_are_counted(plan, tmp_path):
    stories = "\n<|endoftext|>\n".join(f"story {number} " + "word " * 20 for number in range(9000))
    (tmp_path / "mine.txt").write_text(stories)
    flags = ("--data.source=mine.txt", "--data.data_dir=data/mine")
    assert plan(*flags, speed=1300, minutes=2).data.max_stories in range(4000, 9000)
    repeated = plan(*flags, "--output_dir=runs/more", speed=40_000, minutes=60)
    assert repeated.data.max_stories is None
    record = json.loads(RunDir(repeated.output_dir).plan.read_text())
    fresh = load_law("stories").bits_per_byte(
        record["candidates"][0]["num_parameters"], record["candidates"][0]["num_tokens"]
    )
    assert record["candidates"][0]["bits_per_byte"] > fresh + 0.01


def test_contradictions_are_rejected(plan, monkeypatch):
    with pytest.raises(UserError, match=r"train.max_minutes \(3.0\): cannot be combined with minutes"):
        plan("--train.max_minutes=3")
    with pytest.raises(UserError, match=r"must allow at least 50 optimizer steps"):
        plan(speed=10)
    with pytest.raises(
        UserError, match=r"law \(mine.json\): has no law of the built-in corpus, only stories"
    ):
        plan(law_file=own_law("stories"))
    with pytest.raises(UserError, match=r"minutes \(-1.0\): must be a number of minutes above 0; try 10"):
        parse(TrainCommandArgs, ["--minutes=-1"])
    monkeypatch.setattr(session, "num_launched_processes", lambda: 2)
    with pytest.raises(UserError, match=r"minutes \(10\): must be planned on one process; start it without"):
        plan()


TINY = [
    *("--data.max_stories=300", "--data.seq_len=32", "--tokenizer.vocab_size=300"),
    *("--model.num_hidden_layers=2", "--model.hidden_size=16", "--train.batch_size=8"),
    *("--train.warmup_steps=2", "--train.eval_stories=6"),
    *("--train.mixed_precision=no", "--train.per_device_batch_size=8"),
]


def test_planned_run_is_resumed_on_a_slower_machine(plan, monkeypatch, caplog, tmp_path):
    flags = ["--output_dir=runs/planned", "--data.data_dir=data/planned", *TINY, "--train.max_steps=120"]
    config = plan(*flags, speed=20_000, minutes=0.5)
    with send_signals(monkeypatch, {6: signal.SIGTERM}), pytest.raises(TrainingInterrupted):
        train(config)
    monkeypatch.setattr(session, "measure", fake_machine(60))
    resumed = plan_again(*flags, minutes=0.5)

    assert resumed == load_config(tmp_path / "runs/planned/config.yaml")
    [line] = [line for line in caplog.messages if line.startswith("planned again from step")]
    assert "(the plan had" in line and "the learning rate decays by the clock" in line


def test_commands_of_the_page_run(plan, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "measure", fake_machine(20_000))
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    block, _ = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in block.splitlines():
        _, script, *flags = shlex.split(command.replace("roneneldan/TinyStories", "builtin"))
        run(Path(script).stem, [*flags, *TINY, "--train.max_steps=60"])

    assert "make story MINUTES=10 MORE=10     trains" in capsys.readouterr().out
    for run_dir in ("runs/quickstart_10min", "runs/ten"):
        assert json.loads((tmp_path / run_dir / "plan.json").read_text())["minutes"] == 10


def test_commands_train_a_plan_within_its_time(plan, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "measure", fake_machine(20_000))
    flags = [*TINY, "--train.max_steps=60"]
    run_dir = run_train(
        parse(TrainCommandArgs, [*flags, "--output_dir=runs/one", "--minutes=2"]),
        given_options(TrainCommandArgs, flags),
    )
    assert load_config(run_dir / "config.yaml").train.max_steps == 60

    args = parse(StoryArgs, [*flags, "--minutes=2"])
    run_story(args, given_options(StoryArgs, flags))
    assert "bits per byte" in capsys.readouterr().out
    run_dir = tmp_path / "runs/default_2min"
    before = (run_dir / "metrics.jsonl").read_bytes()
    run_story(args, given_options(StoryArgs, flags))  # the same command generates a story
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "data/builtin_2min/manifest.json").is_file()
