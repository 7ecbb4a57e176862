import pytest
from conftest import tiny_model

from tinystories_slm.config import TrainArgs
from tinystories_slm.training.optim import build_optimizers


@pytest.mark.parametrize("family", ["gpt", "modern"])
def test_matrices_decay_and_vectors_do_not(family):
    model = tiny_model(family=family, bias=True)
    decayed, kept = build_optimizers(model, TrainArgs(weight_decay=0.3))[0].param_groups

    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert all("norm" in name or name.endswith("bias") for name in kept_names)
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)
    assert decayed_names | kept_names == set(names.values())  # the tied head once
