"""The training kernels against the model's PyTorch operations."""

import copy
import math

import pytest
import torch
from conftest import FAMILIES, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import parse_config
from tinystories_slm.errors import UserError
from tinystories_slm.kernels.attention import MATMUL
from tinystories_slm.kernels.training import fuse, layers, unsupported_reason
from tinystories_slm.kernels.training.bindings import load_kernels
from tinystories_slm.kernels.training.layers import fused_linear_cross_entropy
from tinystories_slm.model.modeling_tinystories import linear_cross_entropy
from tinystories_slm.training.optimizers import build_optimizers, set_learning_rate
from tinystories_slm.training.runtime import resolve_runtime

CPU = torch.device("cpu")
T = 300  # two full blocks of queries and a partial one
SUPPORTED = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama"},
    "llama, qk_norm": {"family": "llama", "qk_norm": True},
    "llama, grouped queries": {"family": "llama", "num_key_value_heads": 2, "qk_norm": True},
    "llama, untied, relu2": {"family": "llama", "hidden_act": "relu2", "tie_word_embeddings": False},
}
pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(load_kernels(torch.float32) is None, reason="no C compiler"),
]


def model_pair(**overrides):
    """Return a model on torch operations with eager attention, and a copy on the training kernels."""
    plain = tiny_model(**overrides, max_position_embeddings=T, attn_implementation="eager").train()
    fused = copy.deepcopy(plain)
    fused.set_attn_implementation(MATMUL)
    fuse(fused)
    return plain, fused


def batch(batch_size: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(0, 101, (batch_size, length), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, input_ids, *, bf16: bool = False, **kwargs) -> tuple[float, torch.Tensor]:
    """Return the loss, and all gradients as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids, **{"labels": input_ids} | kwargs, use_cache=False, loss_only=True).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("overrides", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_fused_loss_and_gradients_match_the_model(overrides):
    plain, fused = model_pair(**overrides)
    expected, gradients = loss_and_gradients(plain, batch())
    loss, fused_gradients = loss_and_gradients(fused, batch())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()
    names = [name for name, _ in plain.named_parameters()]
    for name, one, other in zip(names, plain.parameters(), fused.parameters(), strict=True):
        assert (other.grad - one.grad).norm() < 1e-4 * one.grad.norm(), name


@pytest.mark.parametrize("overrides", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_fused_bfloat16_gradients_are_as_exact_as_torchs(overrides):
    plain, fused = model_pair(**overrides)
    _, exact = loss_and_gradients(plain, batch())
    _, torchs = loss_and_gradients(plain, batch(), bf16=True)
    loss, ours = loss_and_gradients(fused, batch(), bf16=True)
    assert (ours - exact).norm() < 1.2 * (torchs - exact).norm()
    assert loss == pytest.approx(loss_and_gradients(plain, batch())[0], rel=0.01)


def story_positions(lengths: list[list[int]]) -> torch.Tensor:
    """Positions that restart with each story; one list of lengths per sequence."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def attends_through_kernels(monkeypatch, fused, **kwargs) -> bool:
    """Whether every layer of a forward and backward pass uses the kernels."""
    calls = []
    apply = layers.Block.apply
    monkeypatch.setattr(layers.Block, "apply", lambda *args: calls.append(1) or apply(*args))
    loss_and_gradients(fused, batch(), **kwargs)
    monkeypatch.undo()
    return len(calls) == len(fused.model.layers)


@pytest.mark.parametrize("overrides", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_fused_gradients_of_packed_stories(overrides, monkeypatch):
    plain, fused = model_pair(**overrides)
    # Stories end within a block of queries, at its edge, and after a single token.
    packed = {"position_ids": story_positions([[100, 28, 1, 171], [257, 43]])}
    expected, gradients = loss_and_gradients(plain, batch(), **packed)
    loss, fused_gradients = loss_and_gradients(fused, batch(), **packed)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()
    unpacked, _ = loss_and_gradients(plain, batch())
    assert abs(expected - unpacked) > 1e-4  # the stories matter
    assert attends_through_kernels(monkeypatch, fused, **packed)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_fused_gradients_with_positions_of_each_sequence(bf16, monkeypatch):
    plain, fused = model_pair(family="llama", qk_norm=True)
    positions = torch.arange(T).expand(2, -1) + torch.tensor([[0], [40]])
    expected, gradients = loss_and_gradients(plain, batch(), bf16=bf16, position_ids=positions)
    loss, fused_gradients = loss_and_gradients(fused, batch(), bf16=bf16, position_ids=positions)
    assert loss == pytest.approx(expected, rel=0.01 if bf16 else 1e-6)
    assert (fused_gradients - gradients).norm() < (0.1 if bf16 else 1e-5) * gradients.norm()
    assert attends_through_kernels(monkeypatch, fused, position_ids=positions)


def test_dense_mask_that_is_no_story_mask_uses_the_unfused_layer(monkeypatch):
    plain, fused = model_pair(family="llama")
    mask = torch.ones(T, T).tril().bool()
    mask[200:, 50] = False  # a hole
    mask = mask.expand(2, 1, T, T)
    expected, gradients = loss_and_gradients(plain, batch(), attention_mask=mask)
    loss, fused_gradients = loss_and_gradients(fused, batch(), attention_mask=mask)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()
    assert not attends_through_kernels(monkeypatch, fused, attention_mask=mask)


def test_matmul_attention_of_packed_stories():
    plain = tiny_model(family="llama", max_position_embeddings=T, attn_implementation="eager").train()
    packed = {"position_ids": story_positions([[130, 170], [1, 299]])}
    matmul = copy.deepcopy(plain)
    matmul.set_attn_implementation(MATMUL)
    expected, gradients = loss_and_gradients(plain, batch(), **packed)
    loss, matmul_gradients = loss_and_gradients(matmul, batch(), **packed)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (matmul_gradients - gradients).norm() < 1e-5 * gradients.norm()
    with torch.no_grad():
        torch.testing.assert_close(
            matmul.eval()(batch(), **packed).logits, plain.eval()(batch(), **packed).logits
        )


@given(length=st.integers(2, 40), batch_size=st.integers(1, 3), family=st.sampled_from(["gpt2", "llama"]))
def test_fused_model_handles_any_sequence_length(length, batch_size, family):
    plain, fused = model_pair(family=family)
    input_ids = batch(batch_size, length)
    expected, gradients = loss_and_gradients(plain, input_ids)
    loss, fused_gradients = loss_and_gradients(fused, input_ids)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (fused_gradients - gradients).norm() < 1e-4 * gradients.norm()


@pytest.mark.parametrize("num_items", [None, 1000])
def test_fused_loss_ignores_masked_labels(num_items, monkeypatch):
    monkeypatch.setattr(
        layers, "fused_loss_chunk_rows", lambda *_: 64
    )  # several chunks, the last one partial
    plain, fused = model_pair()
    labels = batch().masked_fill(torch.rand(2, T) < 0.3, -100)
    expected, gradients = loss_and_gradients(plain, batch(), labels=labels, num_items_in_batch=num_items)
    loss, fused_gradients = loss_and_gradients(fused, batch(), labels=labels, num_items_in_batch=num_items)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()


def test_fused_loss_of_an_almost_impossible_token_is_exact():
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
def test_fused_gradients_keep_non_finite_values(weight, bad, bf16):
    _, fused = model_pair(family="llama", qk_norm=True)
    with torch.no_grad():
        fused.get_parameter(f"{weight}.weight").view(-1)[3] = bad
    _, gradients = loss_and_gradients(fused, batch(), bf16=bf16)
    assert not math.isfinite(gradients.norm())


def test_fused_loss_of_a_nan_logit_is_nan():
    hidden = torch.ones(1, 2, 4, requires_grad=True)
    head = torch.zeros(40, 4)
    head[20] = math.nan  # not the label's logit: only the sum of exponentials sees it
    loss = fused_linear_cross_entropy(hidden, head.requires_grad_(), torch.tensor([[1, 2]]))
    loss.backward()
    assert loss.isnan()
    assert hidden.grad.isnan().all()


def test_fused_gradients_are_deterministic():
    _, fused = model_pair(family="llama", qk_norm=True)
    first, second = (loss_and_gradients(fused, batch()) for _ in range(2))
    assert first[0] == second[0]
    assert first[1].equal(second[1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bf16", [False, True])
def test_fused_model_uses_the_updated_weights_in_the_next_step(optimizer, bf16):
    args = parse_config(["--train.optimizer", optimizer, "--train.lr", "1e-2"]).train
    plain, fused = model_pair(family="llama", scale=1.0)
    optimizers = build_optimizers(fused, args)
    set_learning_rate(optimizers, args.lr)
    before, _ = loss_and_gradients(fused, batch(), bf16=bf16)
    for _ in range(3):
        for one in optimizers:
            one.step()
        after, _ = loss_and_gradients(fused, batch(), bf16=bf16)
    plain.load_state_dict(fused.state_dict())
    assert after < 0.98 * before
    assert after == pytest.approx(loss_and_gradients(plain, batch())[0], rel=1e-3 if bf16 else 1e-6)


def test_fused_model_falls_back_to_torch_for_masks_and_generation():
    plain, fused = model_pair(family="llama", qk_norm=True)
    plain.set_attn_implementation(MATMUL)
    padded = torch.ones(2, T, dtype=torch.long)
    padded[0, :20] = 0
    expected, gradients = loss_and_gradients(plain, batch(), attention_mask=padded)
    loss, fused_gradients = loss_and_gradients(fused, batch(), attention_mask=padded)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (fused_gradients - gradients).norm() < 1e-5 * gradients.norm()
    plain.eval(), fused.eval()
    with torch.no_grad():
        assert fused(batch()).logits.equal(plain(batch()).logits)
        prompt = batch(1, 5)
        generated = [model.generate(prompt, max_new_tokens=20, do_sample=False) for model in (plain, fused)]
    assert generated[0].equal(generated[1])


def test_fuse_keeps_names_and_saved_files(tmp_path):
    plain, fused = model_pair(family="llama")
    assert list(plain.state_dict()) == list(fused.state_dict())
    for name, model in (("plain", plain), ("fused", fused)):
        loss_and_gradients(model, batch())
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
def test_resolve_runtime_falls_back_or_rejects_without_a_kernel(flags, reason):
    assert not resolve_runtime(parse_config(flags), CPU).fused
    with pytest.raises(UserError, match=rf"train.cpu_kernels \(fused\) cannot be used: {reason}"):
        resolve_runtime(parse_config([*flags, "--train.cpu_kernels", "fused"]), CPU)


def test_resolve_runtime_falls_back_without_a_compiler(monkeypatch):
    config = parse_config(["--train.mixed_precision", "no"])
    assert resolve_runtime(config, CPU).describe().startswith("micro-batch 4, matmul attention, fused CPU")
    assert not resolve_runtime(parse_config(["--train.cpu_kernels", "torch"]), CPU).fused
    monkeypatch.setattr(layers, "load_kernels", lambda dtype: None)
    assert not resolve_runtime(config, CPU).fused
    model_config = config.model_config(vocab_size=300)
    reason = unsupported_reason(model_config, torch.device("cuda"), torch.float32)
    assert reason == "the kernels run on a CPU, not on cuda"


def test_fused_linear_cross_entropy_matches_the_model():
    hidden, head = torch.randn(2, 7, 16), torch.randn(33, 16)
    labels = torch.randint(0, 33, (2, 7))
    expected = linear_cross_entropy(hidden, head, labels)
    assert fused_linear_cross_entropy(hidden, head, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_unsupported_reason_is_empty_for_supported_families():
    reasons = {
        name: unsupported_reason(tiny_model(**overrides).config, CPU, torch.float32)
        for name, overrides in FAMILIES.items()
    }
    assert {name for name, reason in reasons.items() if not reason} == {
        "gpt2", "llama", "llama, qk_norm, untied",
    }  # fmt: skip
