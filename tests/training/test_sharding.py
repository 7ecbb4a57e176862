"""FSDP2 on two CPU processes, through Accelerate and the configuration file for eight GPUs.

FSDP2 itself runs on CPUs, joined by gloo; Accelerate takes it up for GPU processes only. So these CPU
processes, which run this very file, are told to Accelerate as GPU ones; all that follows is its own and
torch's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from tinystories_slm.config import TrainArgs
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.training.optim import build_optimizers
from tinystories_slm.training.sharding import whole_model

ROOT = Path(__file__).parents[2]
CASES = {"adamw": "gpt", "muon": "modern"}


def build(optimizer: str) -> tuple[TinyStoriesForCausalLM, list[torch.optim.Optimizer], torch.Tensor]:
    """A model, its optimizers and a batch (4, 32); the same wherever it is called."""
    torch.manual_seed(0)
    config = TinyStoriesConfig(
        family=CASES[optimizer], vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = TinyStoriesForCausalLM(config)
    optimizers = build_optimizers(model, TrainArgs(lr=1e-2, optimizer=optimizer))
    return model, optimizers, torch.randint(64, (4, 32))


def two_steps(model, optimizers, input_ids, backward, clip) -> tuple[list[float], list[float]]:
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


def tell(model: TinyStoriesForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    return model.eval().generate(batch[:1, :4], max_new_tokens=8, do_sample=False)


def train_sharded(folder: Path) -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(mixed_precision="no")
    for name in CASES:
        plain, optimizers, batch = build(name)
        model, *optimizers = accelerator.prepare(plain, *optimizers)
        share = batch.tensor_split(accelerator.num_processes)[accelerator.process_index]
        losses, norms = two_steps(model, optimizers, share, accelerator.backward, accelerator.clip_grad_norm_)
        losses = accelerator.reduce(torch.tensor(losses), reduction="mean").tolist()
        whole = whole_model(model)  # by all of them; the rest by the first alone
        if accelerator.is_main_process:
            told = tell(whole, batch)
            whole.save_pretrained(folder / name)
            kinds = [type(p).__name__ for p in (*model.parameters(), *whole.parameters())]
            record = {
                "type": accelerator.distributed_type.value, "kinds": sorted(set(kinds)), "losses": losses,
                "norms": norms, "weights": whole.state_dict(), "told": told,
            }  # fmt: skip
            torch.save(record, folder / f"{name}.pt")
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    accelerator.end_training()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/gpu_8_fsdp2.yaml"]
    done = subprocess.run(
        [sys.executable, *launch, "--num_processes", "2", __file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


# Muon orthogonalizes in bfloat16, which rounds sums of pieces otherwise than sums of wholes.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-6), ("muon", 1e-3)])
def test_a_sharded_model_trains_tells_and_is_saved_like_a_whole_one(sharded, optimizer, tolerance):
    model, optimizers, batch = build(optimizer)
    losses, norms = two_steps(model, optimizers, batch, torch.Tensor.backward, torch.nn.utils.clip_grad_norm_)
    record = torch.load(sharded / f"{optimizer}.pt", weights_only=True)

    assert (record["type"], record["kinds"]) == ("FSDP", ["DTensor", "Parameter"])
    assert record["losses"] == pytest.approx(losses, rel=1e-5)
    assert record["norms"] == pytest.approx(norms, rel=1e-4)
    expected = model.state_dict()
    assert record["weights"].keys() == expected.keys()
    for name, weight in record["weights"].items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)
    assert torch.equal(record["told"], tell(model, batch))

    loaded = TinyStoriesForCausalLM.from_pretrained(sharded / optimizer)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, record["weights"][name]), name


def test_a_model_that_is_not_sharded_is_whole_already():
    model, _, _ = build("adamw")
    assert whole_model(model) is model


if __name__ == "__main__":
    train_sharded(Path(sys.argv[1]))
