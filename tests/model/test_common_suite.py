"""Run transformers' common model tests on our classes: `make common-suite`.

The tests are imported from a source tree of the installed version: the sdist of PyPI, or the directory in
`TRANSFORMERS_SOURCE`. The sdist contains the tests of models, training and configurations. A checkout of the
repository also contains the tests of `generate()` and of the exporters, which then run as well.
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

from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM, TinyStoriesModel

FETCHED = ROOT / ".cache" / f"transformers-{transformers.__version__}"
TESTS = Path(os.environ.get("TRANSFORMERS_SOURCE") or FETCHED) / "tests"
if not (TESTS / "test_modeling_common.py").is_file():
    pytest.skip(f"{TESTS} has no tests of transformers; run make common-suite", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests import the package parameterized")

# Stand-ins for the modules that PyPI's sdist lacks and other tests import: mixins without tests.
STUBS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {"problem_type": "regression"}},
}


def _import_transformers_test(name: str) -> types.ModuleType:
    """Import a test module of transformers as `transformers_tests.NAME`; `tests` is our own package."""
    if "transformers_tests" not in sys.modules:
        package = sys.modules["transformers_tests"] = types.ModuleType("transformers_tests")
        package.__path__ = [str(TESTS)]
        for stub, contents in STUBS.items():
            path = TESTS / stub.replace(".", "/")
            # The last entry is always replaced: its module imports more of the repository than tests.
            if stub.startswith("utils.") or not path.with_suffix(".py").is_file():
                module = types.ModuleType(stub)
                vars(module).update(contents)
                sys.modules[f"transformers_tests.{stub}"] = module
        exporters = importlib.import_module("transformers_tests.exporters.test_export")
        sys.modules["tests.exporters.test_export"] = exporters  # the name that `generation` imports
    return importlib.import_module(f"transformers_tests.{name}")


common = _import_transformers_test("test_modeling_common")
generation = _import_transformers_test("generation.test_utils")
configuration = _import_transformers_test("test_configuration_common")
training = _import_transformers_test("test_training_mixin")

# Many of these tests look up the task of a class in these tables, by its name.
common.MODEL_MAPPING_NAMES[TinyStoriesConfig.model_type] = "TinyStoriesModel"
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TinyStoriesConfig.model_type] = "TinyStoriesForCausalLM"


class Tester:
    """The model tester that transformers' tests require: a small model and a batch."""

    causal_lm_class = TinyStoriesForCausalLM
    is_training = True
    __test__ = False  # pytest must not collect it
    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, family: dict):
        self.family = family

    def get_config(self) -> TinyStoriesConfig:
        options = {
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
        return TinyStoriesConfig(**options | self.family)

    def prepare_config_and_inputs_for_common(self) -> tuple[TinyStoriesConfig, dict[str, torch.Tensor]]:
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        attention_mask = torch.ones_like(input_ids).tril()  # each row padded on the right
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonSuite(common.ModelTesterMixin, generation.GenerationTesterMixin, training.TrainingTesterMixin):
    all_model_classes = (TinyStoriesModel, TinyStoriesForCausalLM)
    model_tester = None  # set by `setUp`
    family: dict

    def setUp(self) -> None:
        self.model_tester = Tester(self.family)
        if "rope" in self._testMethodName:
            self.skipTest("TinyStoriesConfig rejects scaled and partial rotary positions")

    def test_config(self) -> None:
        configuration.ConfigTester(self, TinyStoriesConfig, hidden_size=64, **self.family).run_common_tests()


# Without biases, the code of these families is part of that of the others.
SLOW = ("gpt2", "llama")

for _name, _family in FAMILIES.items():
    _class = "Test" + "".join(part.strip(",").capitalize() for part in _name.split())
    globals()[_class] = type(_class, (CommonSuite, unittest.TestCase), {"family": _family})
    if _name in SLOW:
        globals()[_class] = pytest.mark.slow(globals()[_class])
