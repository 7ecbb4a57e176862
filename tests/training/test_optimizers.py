import pytest
import torch
from conftest import tiny_model

from tinystories_slm.config import TrainArgs
from tinystories_slm.training.optimizers import build_optimizers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weight_decay_applies_to_matrices_only(family):
    model = tiny_model(family=family, bias=True)
    decayed, kept = build_optimizers(model, TrainArgs(weight_decay=0.3))[0].param_groups

    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert all("norm" in name or name.endswith("bias") for name in kept_names)
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)
    assert decayed_names | kept_names == set(names.values())  # the tied head counts once


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_embedding_lr_multiplier_adds_a_group(family):
    model = tiny_model(family=family)
    plain = build_optimizers(model, TrainArgs())[0].param_groups
    *others, embedding = build_optimizers(model, TrainArgs(embedding_lr_multiplier=3.0))[0].param_groups
    assert [list(map(id, embedding["params"])), embedding["lr_rate"], embedding["weight_decay"]] == [
        [id(model.model.embed_tokens.weight)], 3.0, TrainArgs().weight_decay,
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in (*others, embedding)) == sum(len(g["params"]) for g in plain)


def test_muon_takes_block_matrices_in_the_runs_precision():
    model = tiny_model(family="llama")
    args = TrainArgs(optimizer="muon", muon_momentum=0.9, muon_ns_steps=3, embedding_lr_multiplier=3.0)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        adamw, muon = build_optimizers(model, args, precision=precision)
        [group] = muon.param_groups
        assert muon.dtype == dtype
        assert len(group["params"]) == 2 * 7
        assert (group["momentum"], group["ns_steps"]) == (0.9, 3)
        assert [len(group["params"]) for group in adamw.param_groups] == [0, 5, 1]
        assert adamw.param_groups[-1]["lr_rate"] == 3.0
