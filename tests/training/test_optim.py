import pytest
import torch
from conftest import tiny_model

from tinystories_slm.config import TrainArgs
from tinystories_slm.training.optim import build_optimizers


@pytest.mark.parametrize("family", ["gpt", "modern"])
def test_matrices_decay_and_vectors_do_not(family):
    model = tiny_model(family=family, bias=True)
    embedding, matrices, vectors = build_optimizers(model, TrainArgs(weight_decay=0.3))[0].param_groups

    assert [group["weight_decay"] for group in (embedding, matrices, vectors)] == [0.3, 0.3, 0.0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for group in (embedding, matrices) for p in group["params"]}
    kept_names = {names[id(p)] for p in vectors["params"]}
    assert all("norm" in name or name.endswith("bias") for name in kept_names)
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)
    assert decayed_names | kept_names == set(names.values())  # the tied head once
    assert [names[id(p)] for p in embedding["params"]] == ["model.embed_tokens.weight"]


def test_muon_takes_the_blocks_matrices_in_the_type_of_the_run():
    model = tiny_model(family="modern")
    args = TrainArgs(optimizer="muon", momentum=0.9, ns_steps=3, embedding_lr_rate=3.0)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        adamw, muon = build_optimizers(model, args, precision=precision)
        [group] = muon.param_groups
        assert muon.dtype == dtype
        assert len(group["params"]) == 2 * 7
        assert (group["momentum"], group["ns_steps"]) == (0.9, 3)
        assert [len(group["params"]) for group in adamw.param_groups] == [1, 0, 5]
        assert adamw.param_groups[0]["lr_rate"] == 3.0
