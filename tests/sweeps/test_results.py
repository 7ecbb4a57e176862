"""Results of a sweep: rows, seeds, paired differences, table, heat map and law, from known numbers."""

import csv
import io
import json
import math
import statistics

import numpy as np
import pytest
from conftest import ROOT

from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.errors import UserError
from tinystories_slm.sweeps.grid import expand_sweep, read_axes
from tinystories_slm.sweeps.plots import heat_maps, plot_curve, plot_heat_maps
from tinystories_slm.sweeps.results import Measured, SweepRow, check_metrics, combine
from tinystories_slm.sweeps.scaling import describe_law, fit_sweep, law_record
from tinystories_slm.sweeps.table import csv_rows, json_record, markdown_page

DEBUG = str(ROOT / "configs" / "debug.yaml")
GRID = {"model.hidden_size": [16, 32, 64], "model.num_hidden_layers": [1, 2]}


def make_args(**values) -> SweepArgs:
    return SweepArgs(**{"base": DEBUG, **values})


def make_rows(args: SweepArgs, losses: dict[str, float | None]) -> list[SweepRow]:
    """A row for each run, with the loss of its name; None for a run that failed."""
    rows = []
    for run in expand_sweep(args):
        loss, model = losses[run.name], run.config.model
        size = model.num_hidden_layers * model.hidden_size**2
        finished = {
            "num_parameters": size + 1000,
            "num_non_embedding_parameters": size,
            "steps": 20,
            "tokens": 10_000,
            "metrics": {"bits_per_byte": Measured(loss or 0, (loss or 0) - 0.1, (loss or 0) + 0.1)},
            "scored": ("builtin", "1", 20, 900),
        }
        rows.append(
            SweepRow(
                name=run.name,
                labels=run.labels,
                seed=run.seed,
                state="failed: no disk" if loss is None else "finished",
                is_finished=loss is not None,
                is_twin=run.is_twin,
                baseline=run.baseline,
                **(finished if loss is not None else {}),
            )
        )
    return rows


@pytest.fixture
def variants() -> tuple[SweepArgs, list[SweepRow]]:
    """Two seeds whose bases are at other levels, which must not enter the differences."""
    options = {"base": {}, "worse": {"train.beta1": 0.5}, "better": {"train.beta1": 0.6}}
    args = make_args(variants=options, seeds=[0, 1], baseline={"variant": "base"}, metrics=["bits_per_byte"])
    losses = {"base-seed_0": 1.0, "base-seed_1": 2.0, "worse-seed_0": 1.2, "worse-seed_1": 2.4}
    return args, make_rows(args, losses | {"better-seed_0": 0.9, "better-seed_1": None})


def test_table_has_the_mean_of_paired_differences(variants):
    args, rows = variants
    combinations = combine(args, rows)
    differences = {one.labels["variant"]: list(one.differences) for one in combinations}
    assert differences == {
        "base": [],
        "worse": pytest.approx([0.2, 0.4]),
        "better": pytest.approx([-0.1]),
    }
    page = markdown_page(args, read_axes(args), rows, combinations, [])
    lines = page.splitlines()
    start = lines.index("| variant | seeds | bits per byte | bits per byte minus the baseline's |")
    assert lines[start + 2 : start + 5] == [
        "| better | 1 | 0.9000 | -0.1000 |",
        "| base | 2 | 1.5000 ± 0.7071 |  |",
        "| worse | 2 | 1.8000 ± 0.8485 | +0.3000 ± 0.1414 |",
    ]
    assert "5 of 6 runs are finished.\nScored: 20 stories, 900 bytes of builtin." in page
    assert "| better-seed_1 | better | 1 |  |  |  |  |  | failed: no disk |" in lines
    assert (
        "| worse-seed_0 | worse | 0 | 3,048 | 2,048 | 10,000 | 20 | 1.2000 [1.1000, 1.3000] | finished |"
        in lines
    )


def test_csv_and_json_have_the_same_numbers(variants):
    args, rows = variants
    axes, combinations = read_axes(args), combine(args, rows)
    read = list(csv.DictReader(io.StringIO(csv_rows(args, axes, rows))))
    assert [row["bits_per_byte"] for row in read] == ["1.0", "1.2", "0.9", "2.0", "2.4", ""]
    assert (read[1]["variant"], read[1]["bits_per_byte_high"], read[1]["tokens"]) == ("worse", "1.3", "10000")
    record = json.loads(json.dumps(json_record(args, axes, rows, combinations, [])))
    worse = record["combinations"][1]
    assert worse["means"] == {"bits_per_byte": pytest.approx(1.8)}
    assert worse["deviations"] == {"bits_per_byte": pytest.approx(statistics.stdev([1.2, 2.4]))}
    assert record["runs"][0]["metrics"]["bits_per_byte"]["low"] == 0.9
    assert record["axes"]["variant"]["worse"] == {"train.beta1": 0.5}


def test_twin_is_the_baseline_of_its_run_alone():
    args = make_args(
        variants={"base": {}, "a": {"train.beta1": 0.5}},
        baseline={"variant": "base"},
        concurrent_baseline=True,
        jobs=2,
    )
    rows = make_rows(args, {"a-seed_0": 1.5, "a-seed_0-baseline": 1.25})
    [one] = combine(args, rows)
    assert (one.labels["variant"], one.differences) == ("a", [0.25])


def test_heat_map_has_the_means_at_their_places(tmp_path):
    args = make_args(grid=GRID, seeds=[0, 1])
    losses = {
        f"hidden_size_{size}-num_hidden_layers_{layers}-seed_{seed}": size + layers / 10 + seed
        for size in (16, 32, 64)
        for layers in (1, 2)
        for seed in (0, 1)
    }
    losses |= dict.fromkeys(name for name in losses if name.startswith("hidden_size_64-num_hidden_layers_2"))
    axes = read_axes(args)
    [one] = heat_maps(axes, combine(args, make_rows(args, losses)), "bits_per_byte")
    assert (one.columns.name, one.rows.name, one.title) == ("hidden_size", "num_hidden_layers", "")
    assert list(one.columns.options) == ["16", "32", "64"]
    expected = [[16.6, 32.6, 64.6], [16.7, 32.7, math.nan]]
    np.testing.assert_allclose(one.values, expected)
    plot_heat_maps([one], "bits_per_byte", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_further_axes_give_a_heat_map_each():
    args = make_args(variants={"a": {}, "b": {"train.beta1": 0.5}}, grid=GRID | {"train.beta2": [0.9, 0.8]})
    losses = {run.name: float(index) for index, run in enumerate(expand_sweep(args))}
    maps = heat_maps(read_axes(args), combine(args, make_rows(args, losses)), "bits_per_byte")
    assert [one.title for one in maps] == ["a, beta2 0.9", "a, beta2 0.8", "b, beta2 0.9", "b, beta2 0.8"]
    np.testing.assert_allclose(maps[1].values, [[1, 5, 9], [3, 7, 11]])
    one_axis = make_args(grid={"model.hidden_size": [16, 32], "train.beta2": [0.9]})
    losses = dict.fromkeys([run.name for run in expand_sweep(one_axis)], 1.0)
    assert heat_maps(read_axes(one_axis), combine(one_axis, make_rows(one_axis, losses)), "loss") == []


def test_law_is_fitted_for_each_variant_or_its_absence_explained(tmp_path):
    args = make_args(variants={"a": {}, "b": {"train.beta1": 0.5}}, grid=GRID)
    sizes = {run.name: run.config.model for run in expand_sweep(args)}
    losses = {
        name: 0.6 + 5 * (model.num_hidden_layers * model.hidden_size**2) ** -0.3
        for name, model in sizes.items()
    }
    failed = dict.fromkeys(name for name in losses if name.startswith("b-") and "size_16" not in name)
    rows = make_rows(args, losses | failed)
    first, second = fit_sweep(rows, "bits_per_byte")
    assert first.law.exponent("parameters").value == pytest.approx(0.3, rel=1e-3)
    assert first.law.irreducible.value == pytest.approx(0.6, rel=1e-3)
    assert "Power law of bits per byte of a: L = E + A / N^alpha, 6 runs; E = 0.6" in describe_law(
        first, "bits_per_byte"
    )
    expected = {"parameters": 2 * 2 * 64**2}
    assert law_record(first)["prediction"].items() >= expected.items()
    assert describe_law(second, "bits_per_byte") == (
        "No power law of bits per byte of b: 2 different sizes; a fit needs at least 4."
    )
    plot_curve(rows, [first, second], "bits_per_byte", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert fit_sweep(rows, "accuracy") == []


def test_equal_sizes_have_no_law(variants):
    assert fit_sweep(variants[1], "bits_per_byte") == []


def test_metrics_are_checked_before_anything_starts():
    check_metrics(make_args(metrics=["loss", "judge_grammar", "rouge_l"], report_card=True))
    with pytest.raises(UserError, match=r"metrics \(los\): must be one of bits_per_byte, .*, judge_age"):
        check_metrics(make_args(metrics=["los"]))
    with pytest.raises(UserError, match=r"metrics \(distinct_2\): is of the report card; add report_card"):
        check_metrics(make_args(metrics=["distinct_2"]))
