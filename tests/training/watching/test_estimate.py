import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from tinystories_slm import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.config import TrainArgs
from tinystories_slm.training.attention import MATMUL
from tinystories_slm.training.fused import fuse
from tinystories_slm.training.fused.kernels import load_kernels
from tinystories_slm.training.optim import build_optimizers
from tinystories_slm.training.watching.estimate import (
    Peak,
    disk_bytes,
    flops_per_token,
    memory_bytes,
    num_embedding_parameters,
    num_parameters,
    peak_flops,
    utilisation,
)
from tinystories_slm.training.watching.estimate import _published_peak as published_peak

_CPU = torch.device("cpu")


def loss_of(model, *, batch_size: int, seq_len: int, bf16: bool = False) -> torch.Tensor:
    """As the training loop computes it."""
    ids = torch.randint(0, model.config.vocab_size, (batch_size, seq_len))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=ids, labels=ids, use_cache=False, loss_only=True).loss


@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_parameters_are_counted_without_building_the_model(overrides):
    model = tiny_model(**overrides)
    assert num_parameters(model.config) == model.num_parameters()
    looked_up = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert num_embedding_parameters(model.config) == sum(weight.numel() for weight in looked_up)


@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_operations_are_those_that_torch_counts(overrides):
    # Written-out attention: torch has no count for every fused kernel.
    model = tiny_model(attn_implementation="eager", **overrides)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch_size=3, seq_len=40).backward()
    # The last token of a sequence predicts nothing, and the loss leaves its logits out.
    left_out = 3 * 6 * model.lm_head.weight.numel()
    assert counter.get_total_flops() == 3 * 40 * flops_per_token(model.config, 40) - left_out


def test_utilisation_is_a_share_of_all_processes_peaks():
    assert utilisation(1e6, 3e6, Peak(1e13, "made up")) == pytest.approx(0.3)
    assert utilisation(1e6, 3e6, Peak(1e13, "made up"), num_processes=4) == pytest.approx(0.075)


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
        # Without tensor cores for it, cut down, or unknown: better measured than guessed.
        ("Tesla T4", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("Something New", "bf16", None),
    ],
)
def test_the_published_peak_is_that_of_the_very_chip(name, precision, teraflops):
    peak = published_peak(name, precision)
    assert (peak and peak.flops_per_second) == (teraflops and pytest.approx(teraflops * 1e12))
    assert peak is None or name in peak.source


def test_tf32_counts_where_torch_computes_in_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert published_peak("NVIDIA A100-SXM4-80GB", "no").flops_per_second == pytest.approx(156e12)
        assert published_peak("Tesla T4", "no").flops_per_second == pytest.approx(8.1e12)
    finally:
        matmul.fp32_precision = before


def test_a_cpu_is_measured_and_the_product_stated():
    peak = peak_flops(_CPU, "no")
    assert peak.flops_per_second > 1e8
    assert peak.measured
    pattern = r"measured: 512 x 512 x 512 product in float32 on 1 CPU thread(, times \d+)?"
    assert re.fullmatch(pattern, peak.source)


def saved_bytes(model, **how) -> int:
    """What backward will read again, beside the weights, their 16-bit copies and the head's gradient."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.T.shape) for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, **how)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2")
@pytest.mark.parametrize("attention", [MATMUL, "sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_activations_are_those_that_autograd_keeps(overrides, precision, dropout, attention):
    # Two blocks of queries, the second not full; T = 200, so that no activation has the shape of a weight.
    overrides = overrides | {"max_position_embeddings": 208, "num_hidden_layers": 3, "dropout": dropout}
    model = tiny_model(**overrides).train()
    model.set_attn_implementation(attention)
    memory = memory_bytes(
        model.config,
        per_device_batch_size=3,
        seq_len=200,
        precision=precision,
        optimizer="adamw",
        attention=attention,
    )
    kept = saved_bytes(model, batch_size=3, seq_len=200, bf16=precision == "bf16")
    assert memory.activations == pytest.approx(kept, rel=0.03)


@pytest.mark.skipif(load_kernels(torch.float32) is None, reason="no C compiler")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("overrides", [FAMILIES["gpt"], FAMILIES["modern, qk_norm, untied"]])
def test_activations_of_fused_blocks_are_those_that_they_keep(overrides, precision):
    model = tiny_model(**overrides, max_position_embeddings=208, num_hidden_layers=3).train()
    model.set_attn_implementation(MATMUL)
    fuse(model)
    sizes = {"seq_len": 200, "precision": precision, "optimizer": "adamw", "fused": True}
    memory = memory_bytes(model.config, per_device_batch_size=3, **sizes)
    kept = saved_bytes(model, batch_size=3, seq_len=200, bf16=precision == "bf16")
    assert memory.activations == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("hidden_size", "batch_size", "vocab_size"),
    [
        pytest.param(32, 16, 4000, id="mostly logits"),
        pytest.param(256, 1, 8000, id="mostly the gradient of the head"),
    ],
)
def test_a_forward_allocates_what_was_expected(hidden_size, batch_size, vocab_size, precision):
    config = TinyStoriesConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4
    )
    model = TinyStoriesForCausalLM(config).train()
    model.set_attn_implementation(MATMUL)
    memory = memory_bytes(
        config, per_device_batch_size=batch_size, seq_len=64, precision=precision, optimizer="adamw"
    )
    P = num_parameters(config)
    expected = memory.total - memory.optimizer - 8 * P  # the weights are there, their gradients not yet
    peak = peak_of_a_forward(model, batch_size=batch_size, seq_len=64, bf16=precision == "bf16")
    assert expected == pytest.approx(peak, rel=0.1)


@pytest.mark.skipif(load_kernels(torch.float32) is None, reason="no C compiler")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["gpt", "modern"])
@pytest.mark.parametrize(
    ("hidden_size", "batch_size", "vocab_size"),
    [
        pytest.param(256, 2, 500, id="mostly copies of the weights"),
        pytest.param(64, 16, 500, id="mostly activations"),
        pytest.param(32, 16, 8000, id="mostly logits"),
    ],
)
def test_a_fused_forward_allocates_what_was_expected(family, hidden_size, batch_size, vocab_size, precision):
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
    sizes = {"seq_len": 64, "precision": precision, "optimizer": "adamw", "fused": True}
    memory = memory_bytes(config, per_device_batch_size=batch_size, **sizes)
    expected = memory.total - memory.optimizer - 8 * num_parameters(config)
    peak = peak_of_a_forward(model, batch_size=batch_size, seq_len=64, bf16=precision == "bf16")
    assert expected == pytest.approx(peak, rel=0.1)


def peak_of_a_forward(model, **how) -> int:
    """The most bytes that its tensors took at once, beside the parameters."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        loss_of(model, **how)
    taken = highest = 0
    for event in profiler.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            taken += event.nbytes()
            highest = max(highest, taken)
    return highest


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_is_what_it_keeps(optimizer):
    model = tiny_model(family="modern")
    optimizers = build_optimizers(model, TrainArgs(optimizer=optimizer))
    loss_of(model, batch_size=1, seq_len=8).backward()
    kept = 0
    for each in optimizers:
        each.step()
        states = [state for states in each.state.values() for state in states.values()]
        kept += sum(state.nbytes for state in states if torch.is_tensor(state) and state.ndim)
    memory = memory_bytes(
        model.config, per_device_batch_size=1, seq_len=8, precision="no", optimizer=optimizer
    )
    assert memory.optimizer == kept


@pytest.mark.parametrize(
    ("overrides", "batch_size", "precision"),
    [
        pytest.param({"vocab_size": 16_000, "hidden_size": 64}, 16, "no", id="mostly logits"),
        pytest.param({"num_hidden_layers": 8, "family": "modern"}, 16, "bf16", id="mostly activations"),
        pytest.param({"hidden_size": 512, "num_hidden_layers": 8}, 1, "no", id="mostly weights"),
    ],
)
def test_the_process_grows_by_about_what_was_expected(overrides, batch_size, precision):
    settings = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TinyStoriesConfig(**settings | overrides)
    expected = memory_bytes(
        config, per_device_batch_size=batch_size, seq_len=128, precision=precision, optimizer="adamw"
    )
    grown = growth_of_two_steps(config, batch_size=batch_size, seq_len=128, bf16=precision == "bf16")
    assert expected.total / 2 < grown < expected.total * 2


def growth_of_two_steps(config: TinyStoriesConfig, **how) -> int:
    """Bytes by which the process's resident memory rose at its highest."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (proc(5))
    except OSError as error:
        pytest.skip(f"needs Linux with glibc and a /proc to measure memory by: {error}")
    before = status_bytes("VmRSS")
    model = TinyStoriesForCausalLM(config).train()
    model.set_attn_implementation(MATMUL)
    [optimizer] = build_optimizers(model, TrainArgs())
    for _ in range(2):
        loss_of(model, **how).backward()
        optimizer.step()
        optimizer.zero_grad()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    [line] = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line) * 1024


def test_a_checkpoint_takes_its_weights_and_the_optimizers_state():
    config = TinyStoriesConfig(vocab_size=10_000, hidden_size=256, num_hidden_layers=8)
    disk = disk_bytes(config, optimizer="adamw", keep_checkpoints=2)
    assert disk.checkpoint == pytest.approx(12 * num_parameters(config), rel=0.01)
    # Three checkpoints (one of them being written) and two model folders.
    assert disk.run_folder == pytest.approx((3 * 12 + 2 * 4) * num_parameters(config), rel=0.02)
    muon = disk_bytes(config, optimizer="muon", keep_checkpoints=2)
    assert muon.checkpoint < 0.8 * disk.checkpoint
    averaged = disk_bytes(config, optimizer="adamw", keep_checkpoints=2, averaged=True)
    assert averaged.checkpoint - disk.checkpoint == 4 * num_parameters(config)
