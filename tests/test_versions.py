"""The ranges of versions that setup.cfg states, and what the tests run at their ends."""

import re
from configparser import ConfigParser

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from tinystories_slm.hub.card import TESTED_TRANSFORMERS


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.extras_require"][extra] if extra else setup["options"]["install_requires"]
    lines = [line for line in lines.splitlines() if line and not line.startswith("#")]
    return {Requirement(line).name: Requirement(line) for line in lines}


def pins() -> dict[str, Version]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return {
        re.sub(r"[-_.]+", "-", name).lower(): Version(number)
        for name, number in re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE)
    }


def floor(requirement: Requirement) -> Version:
    [lowest] = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return lowest


@pytest.mark.parametrize("extra", [None, "demo", "export", "finetune", "notebooks", "track"])
def test_every_pin_lies_in_its_range_and_every_requirement_has_a_floor(extra):
    for name, requirement in requirements(extra).items():
        pinned = pins()[re.sub(r"[-_.]+", "-", name).lower()]
        assert requirement.specifier.contains(pinned), f"{requirement} excludes the tested {pinned}"
        assert floor(requirement) <= pinned


def test_the_card_names_both_ends_of_transformers_range():
    lowest, *_, newest = map(Version, TESTED_TRANSFORMERS)
    assert lowest == floor(requirements()["transformers"])
    assert newest == pins()["transformers"]


def test_onnx_declares_every_package_that_it_imports():
    text = (ROOT / "tinystories_slm" / "export" / "onnx.py").read_text(encoding="utf-8")
    assert "import onnx_ir" in text and "onnx-ir" in requirements("export")
