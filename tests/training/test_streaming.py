"""Runs on a stream: the weights of a run on files, exact resume, and what ends a run."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from hub.conftest import hub_connection
from hub.loopback import Fault, LoopbackHub
from published_sets import publish_folder
from script_process import processes, run_forked
from story_files import write_parquet
from training.helpers import assert_same_run, read_series, train_with_stops

from tinystories_slm import grammar
from tinystories_slm.config import RunConfig, save_config
from tinystories_slm.data.streaming import StreamError
from tinystories_slm.runs.run_dir import read_json_object
from tinystories_slm.training import train
from tinystories_slm.training.checkpoints import checkpoints, read_progress

CPU_2 = ["accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2.yaml")]
CHUNK = ("--data.streaming_chunk_tokens", "2000")

# The second process is killed at its 25th step, which is in the second chunk.
KILLED_PROCESS = """
import os, signal
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def killed_step(run):
    if run.progress.step == 24 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run)

loop.train_step = killed_step
run_command(loop.train, RunConfig, is_distributed=True)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, hub_connection(hub, tmp_path / "cache"):
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three files of 8 stories: an epoch of about 14,000 tokens, 56 steps."""
    folder = tmp_path_factory.mktemp("stories")
    stories = list(grammar.generate_corpus(30, seed=1))
    for number in range(3):
        write_parquet(folder / f"train-{number}.parquet", stories[8 * number : 8 * (number + 1)])
    write_parquet(folder / "validation.parquet", stories[24:])
    return folder


@pytest.fixture
def streamed_run(folder, tiny_run, tmp_path):
    """A function from flags to a configuration of 90 steps, in two epochs of several chunks each."""

    def configure(*flags: str, name: str = "run", source: Path | str = folder) -> RunConfig:
        data = ("--data.source", str(source), "--data.data_dir", str(tmp_path / f"data of {name}"))
        steps = ("--train.max_steps", "90", "--train.eval_every", "30", "--train.save_every", "11")
        return tiny_run(*data, *steps, "--data.streaming", "true", *CHUNK, *flags, name=name)

    return configure


def test_run_on_a_stream_of_one_chunk_equals_a_run_on_files(streamed_run):
    files = train(streamed_run("--data.streaming", "false", name="files"))
    one_chunk = ("--data.streaming_chunk_tokens", "1000000")
    stream = train(streamed_run(*one_chunk, name="stream"))
    weights = [(run / "last" / "model.safetensors").read_bytes() for run in (files, stream)]
    assert weights[0] == weights[1]
    assert read_series(stream, "train/loss") == read_series(files, "train/loss")
    read = list(read_series(stream, "train/num_stories_read").values())
    assert (read[0], read[-1]) == (24, 48)
    assert read_json_object(stream / "manifest.json")["streaming"] is True


VARIANTS = {
    "contiguous, dropout": ("--model.dropout", "0.1", "--train.per_device_batch_size", "4"),
    "best fit, masked": ("--data.packing", "best_fit", "--data.mask_across_stories", "true"),
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_stream_stopped_by_signals_is_bit_identical(flags, streamed_run, monkeypatch):
    num_threads = threading.active_count()
    whole = train(streamed_run(*flags, name="whole"))
    stops = {5: signal.SIGTERM, 40: signal.SIGUSR1, 71: signal.SIGINT}
    pieces = train_with_stops(streamed_run(*flags, name="pieces"), monkeypatch, stops)

    assert_same_run(whole, pieces)
    assert read_progress(checkpoints(whole)[-1]).stream == read_progress(checkpoints(pieces)[-1]).stream
    assert threading.active_count() == num_threads


@pytest.mark.slow
def test_stream_killed_five_times_is_bit_identical(streamed_run, fault):
    start_s = time.perf_counter()
    flags = ("--train.save_every", "3")
    whole = train(streamed_run(*flags, name="whole"))
    step_s = (time.perf_counter() - start_s) / 90
    config = streamed_run(*flags, name="killed")
    rng, kills = random.Random(0), 0
    while kills < 5:
        process = processes.Process(target=train, args=(config,))
        process.start()
        steps = [path.name for path in checkpoints(config.output_dir)]
        while process.is_alive() and [path.name for path in checkpoints(config.output_dir)] == steps:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 3 * step_s))
        process.kill()  # SIGKILL
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run finished before five kills"
        kills += 1
    train(config)

    assert_same_run(whole, config.output_dir)
    fault(
        f"SIGKILL at {kills} random moments of a run with data.streaming",
        "the same command reads on where the checkpoint says; the model is identical byte for byte",
    )


def test_lost_connection_saves_the_steps_before_it(hub, folder, streamed_run, tmp_path, fault):
    publish_folder(hub, folder, "someone/stories")
    whole = train(streamed_run(name="whole", source="someone/stories"))
    config = streamed_run("--train.save_every", "90", name="cut", source="someone/stories")
    shutil.copytree(tmp_path / "data of whole", config.data.data_dir)
    hub.faults = [Fault("GET", r"resolve/.*/train-1\.parquet", 503)]
    with pytest.raises(StreamError, match=r"train-1\.parquet cannot be read from the Hub") as error:
        train(config)
    assert "\n" not in str(error.value)
    [saved] = checkpoints(config.output_dir)
    progress = read_progress(saved)
    assert 3 < progress.step < 40 and progress.stream["stories"]["num_stories"] <= 8
    hub.faults = []
    assert train(config) == config.output_dir
    for name in ("best", "last"):
        actual, expected = (run / name / "model.safetensors" for run in (config.output_dir, whole))
        assert actual.read_bytes() == expected.read_bytes()
    fault(
        "the Hub does not answer while a run with data.streaming reads from it",
        "after five repetitions the run ends with one line and a checkpoint; the same command continues it",
    )


def launch(script: Path, config_file: Path, *flags: str):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return run_forked(
        ["-m", *CPU_2, str(script), "--config", str(config_file), *flags], ROOT, env=environment
    )


@pytest.mark.slow
def test_two_processes_read_one_stream_and_resume_exactly(streamed_run, tmp_path):
    flags = ("--train.per_device_batch_size", "4", "--train.max_steps", "40", "--train.eval_every", "20")
    config = streamed_run(*flags, name="alone")
    alone = train(config)
    save_config(config, tmp_path / "config.yaml")
    script = ROOT / "scripts" / "train.py"
    done = launch(script, tmp_path / "config.yaml", f"--output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed_process.py"
    killed.write_text(KILLED_PROCESS)
    assert launch(killed, tmp_path / "config.yaml", f"--output_dir={tmp_path / 'cut'}").returncode != 0
    [*_, checkpoint] = checkpoints(tmp_path / "cut")
    assert read_progress(checkpoint).stream["chunk"] > 0
    shutil.copytree(tmp_path / "cut", tmp_path / "fewer")
    done = launch(script, tmp_path / "config.yaml", f"--output_dir={tmp_path / 'cut'}")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "cut")

    # One process reads the same data as two; the sums of the gradients differ by rounding.
    train(streamed_run(*flags, "--output_dir", str(tmp_path / "fewer"), name="alone"))
    for run in ("whole", "fewer"):
        for name in ("train/loss", "val/loss", "train/num_stories_read"):
            expected = read_series(alone, name)
            assert read_series(tmp_path / run, name) == pytest.approx(expected, rel=1e-3), (run, name)


@pytest.mark.slow
def test_fault_of_the_stream_ends_both_processes_with_one_line(streamed_run, folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    config = streamed_run("--train.per_device_batch_size", "4", source=source)
    save_config(config, tmp_path / "config.yaml")
    script = tmp_path / "broken_file.py"
    script.write_text(
        KILLED_PROCESS.replace("== 24", "== 1").replace(
            "os.kill(os.getpid(), signal.SIGKILL)",
            f"open({str(source / 'train-2.parquet')!r}, 'wb').write(b'PAR1 no PAR1')",
        )
    )
    done = launch(script, tmp_path / "config.yaml")
    lines = [line for line in done.stderr.splitlines() if "train-2.parquet cannot be read as parquet" in line]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    [*_, newest] = checkpoints(config.output_dir)
    stream = json.loads((newest / "checkpoint.json").read_text())["progress"]["stream"]
    assert stream["stories"]["num_stories"] > 0
