import pytest
import torch
from conftest import FAMILIES, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import parse_config
from tinystories_slm.errors import UserError
from tinystories_slm.hardware import malloc
from tinystories_slm.kernels.attention import MATMUL, choose_attention, matmul_attention_forward
from tinystories_slm.training.runtime import resolve_per_device_batch_size, resolve_runtime

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
T = 300  # two complete query blocks and a partial one


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_matmul_attention_equals_eager_attention(overrides, dropout):
    model = tiny_model(**overrides, max_position_embeddings=T, dropout=dropout).train(dropout == 0.0)
    input_ids = torch.randint(0, 101, (2, T), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for name in ("eager", MATMUL):
        model.set_attn_implementation(name)
        model.zero_grad()
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    size = torch.stack([gradient.norm() for gradient in gradients[0]]).norm()

    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for expected, gradient in zip(*gradients, strict=True):
        assert (gradient - expected).norm() < 1e-5 * size


def test_matmul_attention_applies_dropout():
    attention = tiny_model().train().model.layers[0].self_attn
    ones = torch.ones(64, 4, 24, 8)
    output, _ = matmul_attention_forward(attention, ones, ones, ones, None, scaling=1.0, dropout=0.5)
    assert output.shape == (64, 24, 4, 8)
    assert output[:, 0].unique().tolist() == [
        0.0,
        2.0,
    ]  # the first token attends to itself, doubled, or is dropped
    assert output.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_matmul_attention_in_bfloat16_is_as_accurate_as_eager(overrides):
    model = tiny_model(**overrides, max_position_embeddings=T)
    input_ids = torch.randint(0, 101, (2, T), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids).logits
    errors = {}
    for name in ("eager", MATMUL):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", torch.bfloat16):
            errors[name] = (model(input_ids).logits - expected).norm().item()
    assert errors[MATMUL] < 1.2 * errors["eager"]


def test_matmul_attention_uses_sdpa_for_padding_and_cache():
    model = tiny_model()
    input_ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(input_ids)
    padded[0, :5] = 0
    expected = model.generate(input_ids, attention_mask=padded, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation(MATMUL)
    assert model.generate(input_ids, attention_mask=padded, max_new_tokens=8, do_sample=False).equal(expected)


@given(batch_size=st.integers(1, 300), seq_len=st.integers(2, 3000), num_processes=st.sampled_from([1, 2, 3]))
def test_micro_batch_divides_the_batch_and_suits_the_device(batch_size, seq_len, num_processes):
    config = parse_config(["--train.batch_size", str(batch_size), "--data.seq_len", str(seq_len)])
    if batch_size % num_processes:
        with pytest.raises(UserError, match=rf"train.batch_size \({batch_size}\) must be a multiple of the"):
            resolve_per_device_batch_size(config, CPU, precision="no", num_processes=num_processes)
        return
    for device, precision, most in ((CPU, "no", 4096), (CPU, "bf16", 4096), (CUDA, "bf16", 32_768)):
        rows = resolve_per_device_batch_size(config, device, precision=precision, num_processes=num_processes)
        assert batch_size % (rows * num_processes) == 0
        assert rows == 1 or rows * seq_len <= most


def test_resolve_runtime_does_not_change_the_allocator(monkeypatch):
    monkeypatch.setattr(malloc, "_is_tuned", False)  # as before `start_run`
    before = malloc.describe_allocator()
    runtime = resolve_runtime(parse_config(["--train.mixed_precision", "no"]), CPU)
    assert not malloc._is_tuned
    assert runtime.allocator == malloc.describe_allocator() == before


def test_defaults_of_a_cpu_and_a_gpu():
    config = parse_config(["--train.mixed_precision", "no"])  # 64 sequences of 256
    runtime = resolve_runtime(config, CPU)
    assert (runtime.attention, runtime.compiled, runtime.per_device_batch_size) == (MATMUL, False, 4)
    assert runtime.describe().startswith("micro-batch 4, matmul attention, ")
    assert choose_attention(CPU, 1025) == choose_attention(CUDA, 256) == "sdpa"
    assert resolve_per_device_batch_size(config, CPU, precision="bf16") == 8
    assert resolve_per_device_batch_size(config, CUDA, precision="bf16") == 64
    flags = ["--train.attention", "eager", "--train.compile", "true", "--train.per_device_batch_size", "2"]
    runtime = resolve_runtime(parse_config(flags), CPU)
    assert (runtime.attention, runtime.compiled, runtime.per_device_batch_size) == ("eager", True, 2)
