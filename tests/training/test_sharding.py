"""FSDP2 on two CPU processes, through Accelerate and the configuration file for eight GPUs.

FSDP2 itself runs on CPUs, joined by gloo, but Accelerate uses it for GPU processes only. So the CPU
processes, which run this file, register with Accelerate as GPU processes. The rest is Accelerate's and
torch's own code.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from script_process import run_forked

from tinystories_slm.config import TrainArgs
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.training.optimizers import build_optimizers, set_learning_rate
from tinystories_slm.training.sharding import unsharded_copy

ROOT = Path(__file__).parents[2]
CASES = {"adamw": "gpt2", "muon": "llama"}


def build_case(optimizer: str) -> tuple[TinyStoriesForCausalLM, list[torch.optim.Optimizer], torch.Tensor]:
    """Return a model, its optimizers and a batch (4, 32), the same at every call."""
    torch.manual_seed(0)
    config = TinyStoriesConfig(
        family=CASES[optimizer], vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = TinyStoriesForCausalLM(config)
    optimizers = build_optimizers(model, TrainArgs(optimizer=optimizer))
    set_learning_rate(optimizers, 1e-2)
    return model, optimizers, torch.randint(64, (4, 32))


def train_two_steps(model, optimizers, input_ids, backward, clip) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for _ in range(2):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        backward(loss)
        norms.append(float(clip(model.parameters(), 1.0)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def generate(model: TinyStoriesForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    return model.eval().generate(batch[:1, :4], max_new_tokens=8, do_sample=False)


def train_sharded(folder: Path) -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(mixed_precision="no")
    for name in CASES:
        plain, optimizers, batch = build_case(name)
        model, *optimizers = accelerator.prepare(plain, *optimizers)
        share = batch.tensor_split(accelerator.num_processes)[accelerator.process_index]
        losses, norms = train_two_steps(
            model, optimizers, share, accelerator.backward, accelerator.clip_grad_norm_
        )
        losses = accelerator.reduce(torch.tensor(losses), reduction="mean").tolist()
        whole = unsharded_copy(model)  # on all processes; the rest on the main process alone
        if accelerator.is_main_process:
            generated = generate(whole, batch)
            whole.save_pretrained(folder / name)
            kinds = [type(p).__name__ for p in (*model.parameters(), *whole.parameters())]
            record = {
                "type": accelerator.distributed_type.value, "kinds": sorted(set(kinds)), "losses": losses,
                "norms": norms, "weights": whole.state_dict(), "generated": generated,
            }  # fmt: skip
            torch.save(record, folder / f"{name}.pt")
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    accelerator.end_training()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/gpu_8_fsdp2.yaml"]
    done = run_forked(
        [*launch, "--num_processes", "2", __file__, folder],
        ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    return folder


# Muon orthogonalizes in bfloat16, in which sums of shards are rounded differently than complete sums.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-6), ("muon", 1e-3)])
def test_sharded_model_equals_an_unsharded_one(sharded, optimizer, tolerance):
    model, optimizers, batch = build_case(optimizer)
    losses, norms = train_two_steps(
        model, optimizers, batch, torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    )
    record = torch.load(sharded / f"{optimizer}.pt", weights_only=True)

    assert (record["type"], record["kinds"]) == ("FSDP", ["DTensor", "Parameter"])
    assert record["losses"] == pytest.approx(losses, rel=1e-5)
    assert record["norms"] == pytest.approx(norms, rel=1e-4)
    expected = model.state_dict()
    assert record["weights"].keys() == expected.keys()
    for name, weight in record["weights"].items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)
    assert torch.equal(record["generated"], generate(model, batch))

    loaded = TinyStoriesForCausalLM.from_pretrained(sharded / optimizer)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, record["weights"][name]), name


def test_unsharded_copy_returns_an_unsharded_model_itself():
    model, _, _ = build_case("adamw")
    assert unsharded_copy(model) is model


if __name__ == "__main__":
    train_sharded(Path(sys.argv[1]))
