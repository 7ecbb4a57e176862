"""Expansion of a sweep file: every combination once, with its command line; a bad file starts nothing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories_slm.config import flatten, parse, parse_config, to_dict
from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.config.sections import MAY_CHANGE_ON_RESUME
from tinystories_slm.errors import UserError
from tinystories_slm.sweeps.grid import expand_sweep, read_axes

DEBUG = str(ROOT / "configs" / "debug.yaml")
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def make_args(**values) -> SweepArgs:
    return SweepArgs(**{"base": DEBUG, **values})


AXES = {
    "model.hidden_size": st.lists(st.sampled_from([16, 32, 64]), min_size=1, unique=True),
    "train.beta2": st.lists(st.sampled_from([0.9, 0.5]), min_size=1, unique=True),
    "model.bias": st.just([True, False]),
    "length": st.just(
        {"short": {"train.max_steps": 5}, "long": {"train": {"max_steps": 9, "warmup_steps": 5}}}
    ),
}


@settings(max_examples=12)
@given(
    grid=st.fixed_dictionaries({}, optional=AXES),
    variants=st.sampled_from([{}, {"a b": {"tokenizer.vocab_size": 300}, "a/c": None}]),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
)
def test_every_combination_is_one_run_with_its_options(grid, variants, seeds):
    args = make_args(grid=grid, variants=variants, seeds=seeds, options={"train.batch_size": 4})
    axes, runs = read_axes(args), expand_sweep(args)
    assert len(runs) == len(seeds) * math.prod(len(axis.options) for axis in axes)
    assert len({run.name for run in runs}) == len(runs) == len({run.config.output_dir for run in runs})
    assert [run.seed for run in runs] == sorted([run.seed for run in runs], key=seeds.index)
    for run in runs:
        assert parse_config(list(run.flags)) == run.config
        options = flatten(to_dict(run.config))
        expected = {"train.seed": run.seed, "train.batch_size": 4}
        for axis in axes:
            expected |= axis.options[run.labels[axis.name]]
        assert {name: options[name] for name in expected} == expected


def test_runs_with_the_same_data_options_share_a_folder():
    args = make_args(
        grid={"model.hidden_size": [16, 32], "data.seq_len": [32, 64]},
        variants={"a": {}, "b": {"tokenizer.vocab_size": 300}, "c": {"data.data_dir": "data/mine"}},
        seeds=[0, 1],
    )
    folders = {}
    for run in expand_sweep(args):
        folders.setdefault(run.labels["variant"], set()).add(run.config.data.data_dir.as_posix())
    assert folders["a"] == {"data/debug"} and folders["c"] == {"data/mine"}
    [other] = folders["b"]
    assert other.startswith("data/debug-")
    # The folder of the base keeps the stories of the base.
    [run] = expand_sweep(make_args(options={"data.source": "tales.txt"}))
    assert run.config.data.data_dir.name.startswith("debug-")
    [run] = expand_sweep(make_args(options={"data.source": "tales.txt", "data.data_dir": "data/tales"}))
    assert run.config.data.data_dir == Path("data/tales")


def test_baselines_pair_with_equal_seeds_and_labels():
    grid = {"model.hidden_size": [16, 32]}
    args = make_args(grid=grid, variants={"base": {}, "new": {}}, seeds=[0, 1], baseline={"variant": "base"})
    pairs = {run.name: run.baseline for run in expand_sweep(args)}
    assert pairs["new-hidden_size_16-seed_1"] == "base-hidden_size_16-seed_1"
    assert pairs["base-hidden_size_16-seed_1"] is None and len(pairs) == 8
    runs = expand_sweep(replace(args, concurrent_baseline=True, jobs=2, only=["new"]))
    assert [run.is_twin for run in runs] == [False, True] * 4
    for run, twin in zip(runs[::2], runs[1::2], strict=True):
        assert run.baseline == twin.name == f"{run.name}-baseline" and twin.labels["variant"] == "base"


def test_only_keeps_the_baseline():
    args = make_args(variants={"base": {}, "x": {}, "y": {}}, baseline={"variant": "base"}, only=["y"])
    assert [run.name for run in expand_sweep(args)] == ["base-seed_0", "y-seed_0"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"grid": {"model.hiden_size": [16]}}, r"unknown option 'model.hiden_size'; did you mean"),
        ({"grid": {"model.hidden_size": [16, 33, 35]}}, r"33.*\(hidden_size_33-seed_0\); .*35"),
        ({"options": {"train.warmup_steps": 99}}, r"train.warmup_steps \(99\) must be below"),
        ({"grid": {"model.hidden_size": 16}}, r"model.hidden_size \(16\): must hold a list of values"),
        ({"grid": {"model.hidden_size": []}}, "must hold a list of values"),
        ({"variants": {"a": 3}}, "must hold names with options"),
        ({"grid": {"a": {"x": {"train.lr": 1}}, "train.lr": [1]}}, "train.lr is set by a and by train.lr"),
        ({"grid": {"train.seed": [1, 2]}}, "train.seed is set for each run; use seeds"),
        ({"options": {"output_dir": "runs/a"}}, r"options \(output_dir\): is set for each run"),
        ({"variants": {"a b": {}, "a/b": {}}}, r"grid \(a_b-seed_0\): two runs would have this folder"),
        ({"baseline": {"size": 1}}, r"baseline \(size\): must name an axis"),
        ({"variants": {"a": {}}, "baseline": {"variant": "b"}}, r"baseline \(variant: b\): must be one of a"),
        ({"variants": {"a": {}}, "only": ["b"]}, r"only \(b\): must be a label; use a"),
        ({"base": "none.yaml"}, "none.yaml"),
        ({"options": {"train.resume": "never"}}, r"train.resume \(never\): a sweep resumes its runs"),
    ],
)
def test_a_bad_file_is_rejected_before_anything_starts(values, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        expand_sweep(make_args(**values))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--seeds=[1,1]"], r"seeds \(\[1, 1\]\): must hold different values"),
        (["--jobs=0", "--cores=-1"], r"jobs \(0\) must be at least 1; cores \(\[-1\]\) must be at least 0"),
        (["--table", "--list"], "table and list cannot be combined"),
        (["--list", "--index=1"], "list and index cannot be combined"),
        (["--concurrent_baseline=true"], "has no effect without baseline; .* needs two runs at a time"),
        (["--evaluation.max_stories=0"], r"evaluation.max_stories \(0\) must be at least 1"),
        (["--evaluation.stories=3"], "unknown option 'evaluation.stories'"),
        (["--grit=3"], "unknown option 'grit'"),
    ],
)
def test_bad_options_of_the_command_are_rejected(flags, problem):
    with pytest.raises(UserError, match=problem):
        parse(SweepArgs, [f"--base={DEBUG}", *flags])


def test_options_on_the_command_line_replace_those_of_the_file(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"base: {DEBUG}\noptions: {{train.max_steps: 9, train.lr: 1e-3}}\nseeds: [0, 1]\n")
    flags = ["--options.train.max_steps", "12", "--seeds", "5", "--options.data.source=a b"]
    [run] = expand_sweep(parse(SweepArgs, [*flags, "--config", str(path)]))
    train = run.config.train
    assert (train.max_steps, train.lr, train.seed, run.config.data.source) == (12, 1e-3, 5, "a b")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_is_valid_and_has_a_folder_of_its_own(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load(path.read_text())
    args = parse(SweepArgs, [f"--config={path}", "--jobs=2"])
    runs = expand_sweep(args)
    assert [yaml.safe_load(other.read_text())["output_dir"] for other in SWEEPS].count(
        values["output_dir"]
    ) == 1
    configs = [to_dict(run.config) for run in runs if not run.is_twin]
    kept = [{k: v for k, v in flatten(one).items() if k not in MAY_CHANGE_ON_RESUME} for one in configs]
    assert all(kept.count(one) == 1 for one in kept)  # each label changes something
