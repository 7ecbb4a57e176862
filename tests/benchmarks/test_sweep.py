"""The sweep: every variant is a valid configuration, and the table is correct."""

import pytest
import sweep
import yaml
from conftest import ROOT
from harness import to_flags

from tinystories_slm.config import parse_config

SPECS = {
    name: yaml.safe_load((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))
    for name in ("sweep.yaml", "packing.yaml")
}


@pytest.mark.parametrize(
    ("file", "name"), [(file, name) for file, spec in SPECS.items() for name in ("base", *spec["variants"])]
)
def test_variant_is_valid_and_differs_from_the_base(file, name):
    spec = SPECS[file]
    base = {"config": str(ROOT / spec["base"]["config"]), **(spec["base"].get("flags") or {})}
    flags = spec["variants"].get(name, {})
    base_config, config = (parse_config(to_flags(options)) for options in (base, base | flags))

    assert (config == base_config) == (name in ("base", "base again"))


def pair(variant: str, seed: int, base: float, run: float | None) -> dict:
    def metrics(bits_per_byte: float | None) -> dict:
        return {
            "bits_per_byte": bits_per_byte,
            "steps": 100 + seed,
            "failed": "error" if bits_per_byte is None else None,
        }

    flags = {"train.lr": 0.1, "model.bias": True}
    return {"variant": variant, "seed": seed, "flags": flags, "base": metrics(base), "run": metrics(run)}


def test_table_has_the_mean_of_paired_differences():
    # The base has another level in each pair, which must not enter the difference.
    pairs = [pair("worse", 0, 1.0, 1.2), pair("worse", 1, 2.0, 2.4), pair("better", 0, 1.0, 0.9)]
    pairs += [pair("better", 1, 2.0, None), pair("wild", 0, 1.0, None)]
    lines = sweep.format_table(pairs).splitlines()[2:]
    flags = "`train.lr=0.1`; `model.bias=true`"

    assert lines == [
        f"| better | {flags} | 1, 1 failed | 0.9000 | 1.0000 | -0.1000 | 100 | 100 |",
        f"| worse | {flags} | 2 | 1.8000 ± 0.8485 | 1.5000 ± 0.7071 | +0.3000 ± 0.1414 | 100 | 100 |",
        f"| wild | {flags} | 1 | failed |  |  |  |  |",
    ]


def test_pair_is_trained_again_only_if_its_flags_change():
    result = {"pairs": [pair("one", 0, 1.0, 1.0)]}

    assert sweep._is_done(result, "one", 0, result["pairs"][0]["flags"])
    assert not sweep._is_done(result, "one", 1, result["pairs"][0]["flags"])
    assert not sweep._is_done(result, "one", 0, {"train.lr": 0.2})
    assert result["pairs"] == []
