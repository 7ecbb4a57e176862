"""Shared by the tests: small models that differ from their initial near-uniform selves."""

import logging
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from script_process import run_forked
from transformers import PreTrainedTokenizerFast

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.sources.file_formats import END_OF_TEXT
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM
from tinystories_slm.runs.recorder import RunRecorder

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The cache of torch.compile does not distinguish lowered instruction sets: code of another run crashes. The
# imports above have set the variable to a folder for all programs.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
    ROOT / ".cache" / f"torchinductor-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside one another, more threads than cores would wait for each other.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
# No deadline: this machine's speed is not what a property is about.
settings.register_profile("project", deadline=None, max_examples=50)
settings.load_profile("project")
logging.getLogger("tinystories_slm").setLevel(logging.INFO)

FAMILIES = {
    "gpt2": {"family": "gpt2"},
    "gpt2 with biases": {"family": "gpt2", "bias": True},
    "llama": {"family": "llama"},
    "llama, grouped queries": {"family": "llama", "num_key_value_heads": 2, "bias": True},
    "llama, qk_norm, untied": {"family": "llama", "qk_norm": True, "tie_word_embeddings": False},
}


def tiny_model(seed: int = 0, scale: float = 8.0, **overrides) -> TinyStoriesForCausalLM:
    """A 2 x 32 model in evaluation mode whose weights are scaled up.

    At the initial 0.02 attention is all but uniform and a wrong mask or position shows nowhere.
    """
    settings = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    }
    torch.manual_seed(seed)
    model = TinyStoriesForCausalLM(TinyStoriesConfig(**settings | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def model(request: pytest.FixtureRequest) -> TinyStoriesForCausalLM:
    return tiny_model(**request.param)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """280 entries: the end of text, 256 bytes, 23 merges."""
    backend = train_bpe(["Once upon a time there was a fox. The fox was happy."] * 3, 280)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, model_max_length=48)


@pytest.fixture(scope="module")
def model_with_tokenizer(tokenizer) -> TinyStoriesForCausalLM:
    """An untrained model of that vocabulary, whose text is not uniform."""
    return tiny_model(vocab_size=len(tokenizer), scale=4.0)


# A prepared corpus of 300 stories, shared, and configurations that train on it in a second or two.
_BASE = ["--data.max_stories", "300", "--data.seq_len", "32", "--tokenizer.vocab_size", "300"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    config = parse_config([*_BASE, "--data.data_dir", str(folder)])
    prepare_data(config.data, config.tokenizer)
    return folder


@pytest.fixture
def tiny_run(data_dir, tmp_path, monkeypatch):
    """A function from flags to a RunConfig; its output folder is `tmp_path / name`."""
    monkeypatch.setattr(RunRecorder, "_plot_loss", _write_loss_plot)

    def configure(*flags: str, name: str = "run") -> RunConfig:
        return parse_config([*_base_flags(data_dir, tmp_path / name), *flags])

    return configure


_plot_loss = RunRecorder._plot_loss


def _write_loss_plot(recorder: RunRecorder) -> None:
    """Draw loss.png once and copy it afterwards: drawing takes longer than training a tiny run."""
    if not _DRAWN:
        _plot_loss(recorder)
        _DRAWN.append(recorder.run_dir.loss_plot.read_bytes())
    recorder.run_dir.loss_plot.write_bytes(_DRAWN[0])


_DRAWN: list[bytes] = []


def _base_flags(data_dir: Path, output_dir: Path) -> list[str]:
    flags = {
        "data.data_dir": data_dir,
        "output_dir": output_dir,
        "model.num_hidden_layers": 2,
        "model.hidden_size": 16,
        "model.num_attention_heads": 2,
        "train.max_steps": 12,
        "train.warmup_steps": 2,
        "train.batch_size": 8,
        "train.per_device_batch_size": 8,
        "train.lr": 1e-2,
        "train.eval_every": 4,
        "train.eval_stories": 6,
        "train.save_every": 4,
        "train.log_every": 1,
        "train.mixed_precision": "no",
    }
    return [*_BASE, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def ignore_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make our model drop the key-value cache, as one does that does not know the name it is passed by."""
    forward = TinyStoriesForCausalLM.forward

    def forgetful(self, *args, cache=None, past_key_values=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TinyStoriesForCausalLM, "forward", forgetful)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def brightness(rgb: str) -> float:
    """Sum of the channels of a computed color."""
    return sum(map(float, rgb.removeprefix("rgb(").removesuffix(")").split(",")))


def run_script(
    name: str, *args: str, cwd: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """A script in a process of its own, from the repository's root unless `cwd` is given."""
    return run_forked([ROOT / "scripts" / name, *args], cwd or ROOT, timeout=timeout)


@contextmanager
def started(command: Sequence[str | Path], **options) -> Iterator[subprocess.Popen]:
    """Start a process that Ctrl-C and the end of a terminal reach, and end it whatever happens.

    A job in the background of a script (nohup, cron) inherits SIGINT or SIGHUP as ignored.
    """
    process = subprocess.Popen(list(map(str, command)), preexec_fn=_restore_signals, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _restore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability", type=Path, help="write the table of faults that were tried to this file"
    )


# The processes of pytest-xdist take files in this order: a long one at the end would run alone.
LONG_FILES = (
    "test_wheel.py", "test_browser.py", "test_resume.py", "test_distributed.py", "test_entropy.py",
    "test_signals.py", "test_roundtrip.py", "test_quickstart.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


_FAULTS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def fault(request: pytest.FixtureRequest):
    """A function that a test calls at its end, with what was done to a run and what came of it."""
    rows = request.config.stash.setdefault(_FAULTS, [])

    def note(done: str, outcome: str) -> None:
        rows.append((done, outcome, f"{request.path.name}::{request.node.originalname}"))

    return note


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--reliability")
    if path is None or exitstatus != 0:
        return
    rows = session.config.stash.get(_FAULTS, [])
    lines = [
        f"| {done} | {outcome} | `{test}`{f', {times} variants' if times > 1 else ''} |"
        for (done, outcome, test), times in Counter(rows).items()
    ]
    head = path.read_text(encoding="utf-8").split("| what was done |")[0]
    table = "| what was done | what came of it | test |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    path.write_text(head + table, encoding="utf-8")
