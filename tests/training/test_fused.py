"""The kernels of training/fused against the model's own mathematics."""

import copy
import math

import pytest
import torch
from conftest import FAMILIES, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import parse_config
from tinystories_slm.errors import InputError
from tinystories_slm.model.modeling_tinystories import linear_cross_entropy
from tinystories_slm.training.attention import MATMUL
from tinystories_slm.training.fused import fuse, layers, why_not_fused
from tinystories_slm.training.fused.kernels import load_kernels
from tinystories_slm.training.fused.layers import fused_linear_cross_entropy
from tinystories_slm.training.optim import build_optimizers
from tinystories_slm.training.settings import resolve_settings

CPU = torch.device("cpu")
T = 300  # two whole blocks of queries, and a part of one
FUSED = {
    "gpt": {"family": "gpt"},
    "modern": {"family": "modern"},
    "modern, qk_norm": {"family": "modern", "qk_norm": True},
    "modern, grouped queries": {"family": "modern", "num_key_value_heads": 2, "qk_norm": True},
    "modern, untied, relu2": {"family": "modern", "hidden_act": "relu2", "tie_word_embeddings": False},
}
pytestmark = pytest.mark.skipif(load_kernels(torch.float32) is None, reason="no C compiler")


def both(**overrides):
    """A model that torch trains, attention written out, and the same one, fused."""
    plain = tiny_model(**overrides, max_position_embeddings=T, attn_implementation="eager").train()
    fused = copy.deepcopy(plain)
    fused.set_attn_implementation(MATMUL)
    fuse(fused)
    return plain, fused


def stories(batch_size: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(0, 101, (batch_size, length), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, input_ids, *, bf16: bool = False, **how) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids, **{"labels": input_ids} | how, use_cache=False, loss_only=True).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("overrides", FUSED.values(), ids=FUSED.keys())
def test_loss_and_gradients_are_those_of_the_model(overrides):
    plain, fused = both(**overrides)
    expected, gradients = loss_and_gradients(plain, stories())
    loss, fused_gradients = loss_and_gradients(fused, stories())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()
    names = [name for name, _ in plain.named_parameters()]
    for name, one, other in zip(names, plain.parameters(), fused.parameters(), strict=True):
        assert (other.grad - one.grad).norm() < 1e-4 * one.grad.norm(), name


@pytest.mark.parametrize("overrides", FUSED.values(), ids=FUSED.keys())
def test_in_bfloat16_they_are_as_near_as_torchs(overrides):
    plain, fused = both(**overrides)
    _, exact = loss_and_gradients(plain, stories())
    _, torchs = loss_and_gradients(plain, stories(), bf16=True)
    loss, ours = loss_and_gradients(fused, stories(), bf16=True)
    assert (ours - exact).norm() < 1.2 * (torchs - exact).norm()
    assert loss == pytest.approx(loss_and_gradients(plain, stories())[0], rel=0.01)


@given(length=st.integers(2, 40), batch_size=st.integers(1, 3), family=st.sampled_from(["gpt", "modern"]))
def test_windows_of_any_length(length, batch_size, family):
    plain, fused = both(family=family)
    input_ids = stories(batch_size, length)
    expected, gradients = loss_and_gradients(plain, input_ids)
    loss, fused_gradients = loss_and_gradients(fused, input_ids)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (fused_gradients - gradients).norm() < 1e-4 * gradients.norm()


@pytest.mark.parametrize("num_items", [None, 1000])
def test_ignored_labels_are_not_counted(num_items, monkeypatch):
    monkeypatch.setattr(layers, "fused_rows_at_once", lambda *_: 64)  # several pieces, the last not full
    plain, fused = both()
    labels = stories().masked_fill(torch.rand(2, T) < 0.3, -100)
    expected, gradients = loss_and_gradients(plain, stories(), labels=labels, num_items_in_batch=num_items)
    loss, fused_gradients = loss_and_gradients(fused, stories(), labels=labels, num_items_in_batch=num_items)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()


def test_a_token_that_is_all_but_impossible_costs_what_it_should():
    hidden = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    head = torch.tensor([[500.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = fused_linear_cross_entropy(hidden, head, torch.tensor([[1]]))
    assert loss.item() == pytest.approx(500.0)
    loss.backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([500.0, 0.0])
    assert head.grad.tolist() == [[1.0, 0.0], [-1.0, 0.0]]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "weight", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.norm"]
)
def test_what_is_not_finite_is_not_hidden(weight, bad, bf16):
    _, fused = both(family="modern", qk_norm=True)
    with torch.no_grad():
        fused.get_parameter(f"{weight}.weight").view(-1)[3] = bad
    _, gradients = loss_and_gradients(fused, stories(), bf16=bf16)
    assert not math.isfinite(gradients.norm())


def test_a_logit_that_is_not_a_number_makes_the_loss_none():
    hidden = torch.ones(1, 2, 4, requires_grad=True)
    head = torch.zeros(40, 4)
    head[20] = math.nan  # not the label's own, so that only the sum of all exponentials can tell
    loss = fused_linear_cross_entropy(hidden, head.requires_grad_(), torch.tensor([[1, 2]]))
    loss.backward()
    assert loss.isnan()
    assert hidden.grad.isnan().all()


def test_the_same_twice_to_the_bit():
    _, fused = both(family="modern", qk_norm=True)
    first, second = (loss_and_gradients(fused, stories()) for _ in range(2))
    assert first[0] == second[0]
    assert first[1].equal(second[1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_an_optimizer_changed_is_what_the_next_step_computes_with(optimizer, bf16):
    args = parse_config(["--train.optimizer", optimizer, "--train.lr", "1e-2"]).train
    plain, fused = both(family="modern", scale=1.0)
    optimizers = build_optimizers(fused, args)
    before, _ = loss_and_gradients(fused, stories(), bf16=bf16)
    for _ in range(3):
        for each in optimizers:
            each.step()
        after, _ = loss_and_gradients(fused, stories(), bf16=bf16)
    plain.load_state_dict(fused.state_dict())
    assert after < 0.98 * before
    assert after == pytest.approx(loss_and_gradients(plain, stories())[0], rel=1e-3 if bf16 else 1e-6)


def test_what_is_not_training_on_whole_windows_is_left_to_the_model():
    plain, fused = both(family="modern", qk_norm=True)
    plain.set_attn_implementation(MATMUL)
    padded = torch.ones(2, T, dtype=torch.long)
    padded[0, :20] = 0
    expected, gradients = loss_and_gradients(plain, stories(), attention_mask=padded)
    loss, fused_gradients = loss_and_gradients(fused, stories(), attention_mask=padded)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()
    plain.eval(), fused.eval()
    with torch.no_grad():
        assert fused(stories()).logits.equal(plain(stories()).logits)
        prompt = stories(1, 5)
        told = [model.generate(prompt, max_new_tokens=20, do_sample=False) for model in (plain, fused)]
    assert told[0].equal(told[1])


def test_names_parameters_and_saved_form_stay(tmp_path):
    plain, fused = both(family="modern")
    assert list(plain.state_dict()) == list(fused.state_dict())
    for name, model in (("plain", plain), ("fused", fused)):
        loss_and_gradients(model, stories())
        model.save_pretrained(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        saved = [(tmp_path / name / file).read_bytes() for name in ("plain", "fused")]
        assert saved[0].replace(b'"eager"', b'"matmul"') == saved[1]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model.bias", "true"], "no kernel for biases"),
        (["--model.dropout", "0.1"], "no kernel for dropout"),
        (["--model.hidden_act", "gelu"], "no kernel for gelu"),
        (["--train.attention", "sdpa"], "attention is sdpa, not matmul"),
        (["--data.seq_len", "2048"], "attention is sdpa, not matmul"),
        (["--train.compile", "true"], "blocks are compiled"),
    ],
)
def test_what_there_is_no_kernel_for_is_left_to_torch_or_refused(flags, reason):
    assert not resolve_settings(parse_config(flags), CPU).fused
    with pytest.raises(InputError, match=rf"train.kernels \(fused\) cannot be: {reason}"):
        resolve_settings(parse_config([*flags, "--train.kernels", "fused"]), CPU)


def test_without_a_compiler_torch_computes(monkeypatch):
    config = parse_config(["--train.mixed_precision", "no"])
    assert resolve_settings(config, CPU).told().startswith("4 sequences at once, matmul attention, fused ker")
    assert not resolve_settings(parse_config(["--train.kernels", "torch"]), CPU).fused
    monkeypatch.setattr(layers, "load_kernels", lambda dtype: None)
    assert not resolve_settings(config, CPU).fused
    model_config = config.model_config(vocab_size=300)
    assert why_not_fused(model_config, torch.device("cuda"), torch.float32).startswith("the kernels are for")


def test_the_loss_alone_is_the_models():
    hidden, head = torch.randn(2, 7, 16), torch.randn(33, 16)
    labels = torch.randint(0, 33, (2, 7))
    expected = linear_cross_entropy(hidden, head, labels)
    assert fused_linear_cross_entropy(hidden, head, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_family_that_can_be_is_fused():
    reasons = {
        name: why_not_fused(tiny_model(**o).config, CPU, torch.float32) for name, o in FAMILIES.items()
    }
    assert {name for name, reason in reasons.items() if not reason} == {
        "gpt", "modern", "modern, qk_norm, untied",
    }  # fmt: skip
