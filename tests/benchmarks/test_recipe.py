"""The comparison of recipes: what it would train can be trained, and its table is right."""

import json

import pytest
import recipe
import yaml
from conftest import ROOT

from tinystories_slm.config import parse_config

TOLD = yaml.safe_load((ROOT / "benchmarks" / "recipe.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["base", *TOLD["variants"]])
def test_every_variant_is_a_configuration_and_differs_from_the_base(name):
    base = {"config": str(ROOT / TOLD["base"]["config"]), **(TOLD["base"].get("flags") or {})}
    flags = TOLD["variants"].get(name, {})
    base_config, config = (
        parse_config([f"--{flag}={json.dumps(v) if isinstance(v, bool) else v}" for flag, v in given.items()])
        for given in (base, base | flags)
    )

    assert (config == base_config) == (name in ("base", "base again"))


def pair(variant: str, seed: int, base: float, run: float | None) -> dict:
    def figures(bits_per_byte: float | None) -> dict:
        return {
            "bits_per_byte": bits_per_byte,
            "steps": 100 + seed,
            "failed": "error" if bits_per_byte is None else None,
        }

    flags = {"train.lr": 0.1, "model.bias": True}
    return {"variant": variant, "seed": seed, "flags": flags, "base": figures(base), "run": figures(run)}


def test_the_table_gives_the_mean_of_differences_between_neighbours():
    # The base is at another level in each pair: its noise is not the difference's.
    pairs = [pair("worse", 0, 1.0, 1.2), pair("worse", 1, 2.0, 2.4), pair("better", 0, 1.0, 0.9)]
    pairs += [pair("better", 1, 2.0, None), pair("wild", 0, 1.0, None)]
    lines = recipe.table(pairs).splitlines()[2:]
    flags = "`train.lr=0.1`; `model.bias=true`"

    assert lines == [
        f"| better | {flags} | 1, 1 failed | 0.9000 | 1.0000 | -0.1000 | 100 | 100 |",
        f"| worse | {flags} | 2 | 1.8000 ± 0.8485 | 1.5000 ± 0.7071 | +0.3000 ± 0.1414 | 100 | 100 |",
        f"| wild | {flags} | 1 | failed | | | | |",
    ]


def test_a_pair_is_trained_once_and_again_when_its_flags_change():
    result = {"pairs": [pair("one", 0, 1.0, 1.0)]}

    assert recipe._is_done(result, "one", 0, result["pairs"][0]["flags"])
    assert not recipe._is_done(result, "one", 1, result["pairs"][0]["flags"])
    assert not recipe._is_done(result, "one", 0, {"train.lr": 0.2})
    assert result["pairs"] == []
