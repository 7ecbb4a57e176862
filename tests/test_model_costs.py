import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from tinystories_slm.config import TrainArgs
from tinystories_slm.hardware.peak import PeakFlops, mfu, peak_flops
from tinystories_slm.hardware.peak import _published_peak as published_peak
from tinystories_slm.kernels.attention import MATMUL
from tinystories_slm.kernels.training import fuse
from tinystories_slm.kernels.training.bindings import load_kernels
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM
from tinystories_slm.model_costs import (
    disk_bytes,
    flops_per_token,
    memory_bytes,
    num_embedding_parameters,
    num_parameters,
)
from tinystories_slm.training.optimizers import OPTIMIZERS, build_optimizers

_CPU = torch.device("cpu")


def compute_loss(model, *, batch_size: int, seq_len: int, bf16: bool = False) -> torch.Tensor:
    """Loss of a random batch, computed as in the training loop."""
    ids = torch.randint(0, model.config.vocab_size, (batch_size, seq_len))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=ids, labels=ids, use_cache=False, loss_only=True).loss


@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_num_parameters_matches_the_built_model(overrides):
    model = tiny_model(**overrides)
    assert num_parameters(model.config) == model.num_parameters()
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert num_embedding_parameters(model.config) == sum(weight.numel() for weight in embeddings)


@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_flops_per_token_matches_torchs_flop_counter(overrides):
    # Eager attention: torch cannot count the FLOPs of every fused kernel.
    model = tiny_model(attn_implementation="eager", **overrides)
    with FlopCounterMode(display=False) as counter:
        compute_loss(model, batch_size=3, seq_len=40).backward()
    # The last token of a sequence has no label, and the loss does not compute its logits.
    not_computed = 3 * 6 * model.lm_head.weight.numel()
    assert counter.get_total_flops() == 3 * 40 * flops_per_token(model.config, 40) - not_computed


def test_mfu_divides_by_the_peak_of_all_processes():
    assert mfu(1e6, 3e6, PeakFlops(1e13, "made up")) == pytest.approx(0.3)
    assert mfu(1e6, 3e6, PeakFlops(1e13, "made up"), num_processes=4) == pytest.approx(0.075)


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "no", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA H200 NVL", "fp16", 835.5),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        # No tensor cores for the dtype, a cut-down chip, or an unknown name: measured, not guessed.
        ("Tesla T4", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("Something New", "bf16", None),
    ],
)
def test_published_peak_matches_the_exact_chip(name, precision, teraflops):
    peak = published_peak(name, precision)
    assert (peak and peak.flops_per_second) == (teraflops and pytest.approx(teraflops * 1e12))
    assert peak is None or name in peak.method


def test_published_peak_uses_tf32_if_torch_does():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert published_peak("NVIDIA A100-SXM4-80GB", "no").flops_per_second == pytest.approx(156e12)
        assert published_peak("Tesla T4", "no").flops_per_second == pytest.approx(8.1e12)
    finally:
        matmul.fp32_precision = before


def test_peak_flops_measures_a_cpu_and_describes_the_product():
    peak = peak_flops(_CPU, "no")
    assert peak.flops_per_second > 1e8
    assert peak.is_measured
    pattern = r"measured: 512 x 512 x 512 product in float32 on 1 CPU thread(, times \d+)?"
    assert re.fullmatch(pattern, peak.method)


def saved_bytes(model, **batch) -> int:
    """Bytes saved for backward, without the weights, their 16-bit copies and the head's gradient."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.T.shape) for p in model.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            saved[storage.data_ptr()] = storage  # holding it prevents the reuse of its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_loss(model, **batch)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2")
@pytest.mark.parametrize("attention", [MATMUL, "sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_activations_match_what_autograd_saves(overrides, precision, dropout, attention):
    # Two blocks of queries, the second partial; T = 200, so that no activation has the shape of a weight.
    overrides = overrides | {"max_position_embeddings": 208, "num_hidden_layers": 3, "dropout": dropout}
    model = tiny_model(**overrides).train()
    model.set_attn_implementation(attention)
    memory = memory_bytes(
        model.config,
        per_device_batch_size=3,
        seq_len=200,
        precision=precision,
        optimizer_bytes=0,
        attention=attention,
    )
    saved = saved_bytes(model, batch_size=3, seq_len=200, bf16=precision == "bf16")
    assert memory.activations == pytest.approx(saved, rel=0.03)


@pytest.mark.compiler
@pytest.mark.skipif(load_kernels(torch.float32) is None, reason="no C compiler")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("overrides", [FAMILIES["gpt2"], FAMILIES["llama, qk_norm, untied"]])
def test_fused_activations_match_what_autograd_saves(overrides, precision):
    model = tiny_model(**overrides, max_position_embeddings=208, num_hidden_layers=3).train()
    model.set_attn_implementation(MATMUL)
    fuse(model)
    sizes = {"seq_len": 200, "precision": precision, "optimizer_bytes": 0, "fused": True}
    memory = memory_bytes(model.config, per_device_batch_size=3, **sizes)
    saved = saved_bytes(model, batch_size=3, seq_len=200, bf16=precision == "bf16")
    assert memory.activations == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("hidden_size", "batch_size", "vocab_size"),
    [
        pytest.param(32, 16, 4000, id="mostly logits"),
        pytest.param(256, 1, 8000, id="mostly the gradient of the head"),
    ],
)
def test_expected_memory_matches_the_peak_of_a_forward(hidden_size, batch_size, vocab_size, precision):
    config = TinyStoriesConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4
    )
    model = TinyStoriesForCausalLM(config).train()
    model.set_attn_implementation(MATMUL)
    memory = memory_bytes(
        config, per_device_batch_size=batch_size, seq_len=64, precision=precision, optimizer_bytes=0
    )
    P = num_parameters(config)
    expected = memory.total - 8 * P  # weights exist already, gradients not yet
    peak = peak_of_a_forward(model, batch_size=batch_size, seq_len=64, bf16=precision == "bf16")
    assert expected == pytest.approx(peak, rel=0.1)


@pytest.mark.compiler
@pytest.mark.skipif(load_kernels(torch.float32) is None, reason="no C compiler")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("hidden_size", "batch_size", "vocab_size"),
    [
        pytest.param(256, 2, 500, id="mostly copies of the weights"),
        pytest.param(64, 16, 500, id="mostly activations"),
        pytest.param(32, 16, 8000, id="mostly logits"),
    ],
)
def test_expected_memory_matches_the_peak_of_a_fused_forward(
    family, hidden_size, batch_size, vocab_size, precision
):
    config = TinyStoriesConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = TinyStoriesForCausalLM(config).train()
    model.set_attn_implementation(MATMUL)
    fuse(model)
    sizes = {"seq_len": 64, "precision": precision, "optimizer_bytes": 0, "fused": True}
    memory = memory_bytes(config, per_device_batch_size=batch_size, **sizes)
    expected = memory.total - 8 * num_parameters(config)
    peak = peak_of_a_forward(model, batch_size=batch_size, seq_len=64, bf16=precision == "bf16")
    assert expected == pytest.approx(peak, rel=0.1)


def peak_of_a_forward(model, **batch) -> int:
    """Peak bytes of the tensors that a forward allocates."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        compute_loss(model, **batch)
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():  # in chronological order
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_memory_matches_its_state(optimizer):
    model = tiny_model(family="llama")
    optimizers = build_optimizers(model, TrainArgs(optimizer=optimizer))
    compute_loss(model, batch_size=1, seq_len=8).backward()
    kept = 0
    for one in optimizers:
        one.step()
        states = [state for states in one.state.values() for state in states.values()]
        kept += sum(state.nbytes for state in states if torch.is_tensor(state) and state.ndim)
    assert OPTIMIZERS[optimizer].state_bytes(model.config) == kept


@pytest.mark.parametrize(
    ("overrides", "batch_size", "precision"),
    [
        pytest.param({"vocab_size": 16_000, "hidden_size": 64}, 16, "no", id="mostly logits"),
        pytest.param({"num_hidden_layers": 8, "family": "llama"}, 16, "bf16", id="mostly activations"),
        pytest.param({"hidden_size": 512, "num_hidden_layers": 8}, 1, "no", id="mostly weights"),
    ],
)
def test_expected_memory_is_within_twice_the_process_growth(overrides, batch_size, precision):
    defaults = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TinyStoriesConfig(**defaults | overrides)
    expected = memory_bytes(
        config,
        per_device_batch_size=batch_size,
        seq_len=128,
        precision=precision,
        optimizer_bytes=8 * num_parameters(config),
    )
    grown = growth_of_two_steps(config, batch_size=batch_size, seq_len=128, bf16=precision == "bf16")
    assert expected.total / 2 < grown < expected.total * 2


def growth_of_two_steps(config: TinyStoriesConfig, **batch) -> int:
    """Bytes by which the peak of the process's resident memory exceeds the memory before two steps."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory (proc(5))
    except OSError as error:
        pytest.skip(f"memory is measured on Linux with glibc and /proc: {error}")
    before = status_bytes("VmRSS")
    model = TinyStoriesForCausalLM(config).train()
    model.set_attn_implementation(MATMUL)
    [optimizer] = build_optimizers(model, TrainArgs())
    for _ in range(2):
        compute_loss(model, **batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    [line] = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line) * 1024


def test_disk_bytes_counts_weights_and_optimizer_state():
    config = TinyStoriesConfig(vocab_size=10_000, hidden_size=256, num_hidden_layers=8)
    disk = disk_bytes(config, optimizer_bytes=8 * num_parameters(config), num_checkpoints=2)
    assert disk.checkpoint == pytest.approx(12 * num_parameters(config), rel=0.01)
    # Three checkpoints (one of them being written) and two model folders.
    assert disk.run_folder == pytest.approx((3 * 12 + 2 * 4) * num_parameters(config), rel=0.02)
    kept = disk_bytes(config, optimizer_bytes=8 * num_parameters(config), num_checkpoints=2, num_models=5)
    assert kept.run_folder - disk.run_folder == 5 * disk.model_folder
    muon = disk_bytes(config, optimizer_bytes=OPTIMIZERS["muon"].state_bytes(config), num_checkpoints=2)
    assert muon.checkpoint < 0.8 * disk.checkpoint
    averaged = disk_bytes(
        config, optimizer_bytes=8 * num_parameters(config), num_checkpoints=2, averaged=True
    )
    assert averaged.checkpoint - disk.checkpoint == 4 * num_parameters(config)
