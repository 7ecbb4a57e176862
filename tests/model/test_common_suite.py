"""Our classes under transformers' own common tests: `make common-suite`.

The tests stay where they come from, a source tree of the installed version: the distribution on
PyPI, or the one that `TRANSFORMERS_SOURCE` names. PyPI's has the tests of models, training and
configurations; a checkout of the repository also has those of `generate()` and of the exporters,
and then they run as well.
"""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, ROOT

from tinystories_slm import TinyStoriesConfig, TinyStoriesForCausalLM, TinyStoriesModel

FETCHED = ROOT / ".cache" / f"transformers-{transformers.__version__}"
TESTS = Path(os.environ.get("TRANSFORMERS_SOURCE") or FETCHED) / "tests"
if not (TESTS / "test_modeling_common.py").is_file():
    pytest.skip(f"no tests of transformers in {TESTS}: make common-suite", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests import the package parameterized")

# What other tests import from modules that PyPI's distribution lacks: here, mixins without a test.
LEFT_OUT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {"problem_type": "regression"}},
}


def _import_their(name: str) -> types.ModuleType:
    """A module of theirs, under a name that leaves `tests`, which both sides use, to us."""
    if "transformers_tests" not in sys.modules:
        package = sys.modules["transformers_tests"] = types.ModuleType("transformers_tests")
        package.__path__ = [str(TESTS)]
        for left_out, contents in LEFT_OUT.items():
            path = TESTS / left_out.replace(".", "/")
            # The last one is no mixin: its module asks for more of the repository than tests.
            if left_out.startswith("utils.") or not path.with_suffix(".py").is_file():
                module = types.ModuleType(left_out)
                vars(module).update(contents)
                sys.modules[f"transformers_tests.{left_out}"] = module
        exporters = importlib.import_module("transformers_tests.exporters.test_export")
        sys.modules["tests.exporters.test_export"] = exporters  # as `generation` spells it
    return importlib.import_module(f"transformers_tests.{name}")


common = _import_their("test_modeling_common")
generation = _import_their("generation.test_utils")
configuration = _import_their("test_configuration_common")
training = _import_their("test_training_mixin")

# Many of those tests know from these tables, by a class's name, what it is for.
common.MODEL_MAPPING_NAMES[TinyStoriesConfig.model_type] = "TinyStoriesModel"
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TinyStoriesConfig.model_type] = "TinyStoriesForCausalLM"


class Tester:
    """The small model, and the batch for it, that transformers' tests ask for."""

    causal_lm_class = TinyStoriesForCausalLM
    is_training = True
    __test__ = False  # for pytest
    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, family: dict):
        self.family = family

    def get_config(self) -> TinyStoriesConfig:
        settings = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        return TinyStoriesConfig(**settings | self.family)

    def prepare_config_and_inputs_for_common(self) -> tuple[TinyStoriesConfig, dict[str, torch.Tensor]]:
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        attention_mask = torch.ones_like(input_ids).tril()  # each row padded on the right
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonSuite(common.ModelTesterMixin, generation.GenerationTesterMixin, training.TrainingTesterMixin):
    all_model_classes = (TinyStoriesModel, TinyStoriesForCausalLM)
    model_tester = None  # made anew by `setUp`
    family: dict

    def setUp(self) -> None:
        self.model_tester = Tester(self.family)
        if "rope" in self._testMethodName:
            self.skipTest("scaled and partial rotary positions are refused by TinyStoriesConfig")

    def test_config(self) -> None:
        configuration.ConfigTester(self, TinyStoriesConfig, hidden_size=64, **self.family).run_common_tests()


for _name, _family in FAMILIES.items():
    _class = "Test" + "".join(part.strip(",").capitalize() for part in _name.split())
    globals()[_class] = type(_class, (CommonSuite, unittest.TestCase), {"family": _family})
