"""What a step read: compared with the batches that the training loop itself reads."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script
from script_process import run_forked

from tinystories_slm.config import RunConfig, save_config
from tinystories_slm.config.command_args.inspection import InspectDataArgs
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.errors import UserError
from tinystories_slm.inspection.inspect_data import inspect_data
from tinystories_slm.inspection.run_data import RunData
from tinystories_slm.training import loop, train

# Writes what the model of each process gets, in place of training.
RECORDING = """
import os, sys
from pathlib import Path
import numpy as np
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

micro_batches, number = loop.micro_batches, [0]

def recorded(run):
    for inputs in micro_batches(run):
        number[0] += 1
        values = {name: value.numpy() for name, value in inputs.items() if value.ndim == 2}
        name = f"{run.progress.step + 1:03d}-{run.accelerator.process_index}-{number[0]:04d}.npz"
        np.savez(run.config.output_dir / name, **values)
        yield inputs

loop.micro_batches = recorded
run_command(loop.train, RunConfig, is_distributed=True)
"""
LAUNCHER = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
MASKED = ("--data.mask_across_stories", "true")
VARIANTS = {
    "contiguous": ("--data.packing", "contiguous"),
    "document": ("--data.packing", "document"),
    "best_fit": ("--data.packing", "best_fit"),
    "contiguous, masked": ("--data.packing", "contiguous", *MASKED),
    "document, masked": ("--data.packing", "document", *MASKED),
    "best_fit, masked": ("--data.packing", "best_fit", *MASKED),
}


def record_batches(config: RunConfig, monkeypatch) -> dict[int, dict[str, np.ndarray]]:
    """Train, and return the inputs of each step, from 1, as the loop read them."""
    micro_batches, found = loop.micro_batches, {}

    def recorded(run):
        for inputs in micro_batches(run):
            values = {name: value.numpy() for name, value in inputs.items() if value.ndim == 2}
            found.setdefault(run.progress.step + 1, []).append(values)
            yield inputs

    with monkeypatch.context() as patch:
        patch.setattr(loop, "micro_batches", recorded)
        train(config)
    return {step: join(parts) for step, parts in found.items()}


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compare(run_dir: Path, recorded: dict[int, dict[str, np.ndarray]]) -> RunData:
    """Compare the windows, and the tokens of each part of a story, with what the loop read."""
    run = RunData.open(run_dir)
    texts = list(iter_raw_stories(run.config.data.data_dir, "train"))
    stories = [[*ids, 0] for ids in encode_stories(run.tokenizer, texts)]
    assert run.num_steps == len(recorded)
    for step, inputs in recorded.items():
        batch = run.batch(step)
        assert np.array_equal(batch.input_ids, inputs["input_ids"])
        assert np.array_equal(batch.labels, inputs["labels"])
        assert (batch.position_ids is None) == ("position_ids" not in inputs)
        if batch.position_ids is not None:
            assert np.array_equal(batch.position_ids, inputs["position_ids"])
        for row, parts in enumerate(run.parts(step)):
            read = inputs["input_ids"][row]
            covered = np.zeros(len(read), dtype=bool)
            for part in parts:
                columns = slice(part.column, part.column + part.num_tokens)
                tokens = stories[part.story][part.first_token : part.first_token + part.num_tokens]
                assert read[columns].tolist() == tokens and part.story_tokens == len(stories[part.story])
                covered[columns] = True
            predicted = inputs["labels"][row][1:] != -100
            assert sum(part.num_predicted for part in parts) == predicted.sum()
            assert (read[~covered] == 0).all()  # padding
    return run


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_windows_and_stories_are_those_that_the_loop_read(flags, tiny_run, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")  # 12 stories: the run reads several epochs
    family = ("--model.family", "llama") if MASKED[0] in flags else ()
    config = tiny_run(
        *flags, *family, "--data.data_dir", str(folder), "--data.max_stories", "12",
        "--train.max_steps", "40", "--train.per_device_batch_size", "4",
        "--train.eval_every", "40", "--train.save_every", "40",
    )  # fmt: skip
    recorded = record_batches(config, monkeypatch)
    run = compare(config.output_dir, recorded)

    # The other way: each story's steps, from what the loop read.
    expected: dict[int, set[int]] = {}
    for step in recorded:
        for parts in run.parts(step):
            for part in parts:
                if part.has_text:
                    expected.setdefault(part.story, set()).add(step)
    num_stories = len(run.dataset.document_ends)
    found: dict[int, set[int]] = {}
    for step, _, part in run.reads_of(np.arange(num_stories)):
        found.setdefault(part.story, set()).add(step)
    assert found == expected and len(found) == num_stories
    record = inspect_data(InspectDataArgs(run=config.output_dir, story=3))
    assert record["stories"][0]["steps"] == sorted(expected[3])


def test_two_processes_read_the_same_windows(tiny_run, tmp_path):
    config = tiny_run(
        "--train.per_device_batch_size", "2", "--data.packing", "document", "--train.max_steps", "4"
    )
    save_config(config, tmp_path / "config.yaml")
    script = tmp_path / "record.py"
    script.write_text(RECORDING)
    command = ["-m", *LAUNCHER, script, "--config", tmp_path / "config.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = run_forked(command, ROOT, env=environment)
    assert done.returncode == 0, done.stderr

    recorded: dict[int, list[dict[str, np.ndarray]]] = {}
    for path in sorted(config.output_dir.glob("*.npz")):  # by step, process and micro-batch
        with np.load(path) as values:
            recorded.setdefault(int(path.name[:3]), []).append(dict(values))
    assert all(len(parts) == 4 for parts in recorded.values())
    compare(config.output_dir, {step: join(parts) for step, parts in recorded.items()})


def test_the_command_prints_and_writes_json(tiny_run, tmp_path):
    run_dir = train(tiny_run())
    output = tmp_path / "step.json"
    done = run_script("inspect_data.py", "--run", str(run_dir), "--step", "12", "--output", str(output))
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["step"] == 12 and len(record["windows"]) == 8
    window = record["windows"][0]
    assert window["text"] in done.stdout and len(window["input_ids"]) == 32
    part = window["parts"][-1]
    assert f"story {part['story']} (tokens {part['first_token']}-" in done.stdout

    [text] = [
        text
        for row, text in enumerate(iter_raw_stories(RunData.open(run_dir).config.data.data_dir, "train"))
        if row == part["story"]
    ]
    record = inspect_data(InspectDataArgs(run=run_dir, text=text[:40]))
    assert part["story"] in [story["story"] for story in record["stories"]]
    assert all(text[:40] in story["text"] for story in record["stories"])
    [own] = [story for story in record["stories"] if story["story"] == part["story"]]
    assert 12 in own["steps"]


def test_streamed_data_are_rejected_in_one_line(tiny_run):
    run_dir = train(tiny_run("--train.max_steps", "3"))
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("streaming: false", "streaming: true"))
    with pytest.raises(UserError, match=r"its stories were streamed .* inspect a run on prepared data"):
        inspect_data(InspectDataArgs(run=run_dir, step=1))


def test_bad_input_is_one_line(tiny_run, tmp_path):
    run_dir = train(tiny_run("--train.max_steps", "3"))
    for options, message in (
        ({"step": 4}, r"step \(4\): must be between 1 and 3"),
        ({"step": 0}, r"step \(0\): must be between 1 and 3"),
        ({"story": 10**6}, r"story \(1000000\): must be below \d+, the number of training stories"),
        ({"text": "no such text"}, r"text \(no such text\): must occur in a training story"),
        ({"run": tmp_path, "step": 1}, r"run .*: must be a run directory with a config.yaml"),
        ({}, r"step, story, text \(none\): exactly one must be set"),
        ({"step": 1, "story": 1}, r"step, story, text \(step, story\): exactly one"),
    ):
        with pytest.raises(UserError, match=message):
            inspect_data(InspectDataArgs(**{"run": run_dir} | options))
    path = run_dir / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace(str(RunData.open(run_dir).config.data.data_dir), str(tmp_path / "gone")))
    with pytest.raises(
        UserError, match=r"data.data_dir .*gone.*: must hold the data of the run; prepare them"
    ):
        inspect_data(InspectDataArgs(run=run_dir, step=1))
