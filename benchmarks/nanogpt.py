"""nanoGPT as a peer: its own train.py, unchanged, from a checkout that the user points at.

Nothing of it is kept here. Token files are converted to its folder at run time, its printed lines are read,
and the weights of its checkpoint are brought into our gpt family, whose mathematics it is.
"""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import Finished, Line, run_process

from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM


@dataclass(frozen=True)
class Iteration:
    """What nanoGPT prints of one."""

    number: int
    loss: float
    step_seconds: float
    at_seconds: float
    """When it was printed, after the start of the process."""


def revision(checkout: Path) -> str:
    """The commit of the checkout, and whether anything in it was changed."""
    described = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()


def write_data(prepared: Path, folder: Path) -> Path:
    """Our token files of `prepared` as nanoGPT's: train.bin and val.bin in uint16, meta.pkl."""
    manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    if manifest["vocab_size"] > 2**16:
        raise ValueError(
            f"nanoGPT stores ids in 16 bits; a vocabulary of {manifest['vocab_size']} does not fit"
        )
    folder.mkdir(parents=True)
    for ours, theirs in (("train", "train"), ("validation", "val")):
        ids = np.fromfile(prepared / f"{ours}.bin", dtype=np.dtype(manifest["token_dtype"]).newbyteorder("<"))
        ids.astype("<u2").tofile(folder / f"{theirs}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": manifest["vocab_size"]}))
    return folder


def train(
    checkout: Path,
    dataset: Path,
    settings: Mapping[str, int | float | str | bool],
    *,
    watch: Callable[[Line], None] = lambda line: None,
) -> Finished:
    """Run its train.py on the CPU, with the flags that its README gives for one, and `settings`.

    One batch a step (it is made for GPUs and would else accumulate 40); evaluations of one batch, as its
    estimate is not what is compared.
    """
    flags = {
        "device": "cpu",
        "compile": False,
        "gradient_accumulation_steps": 1,
        "eval_iters": 1,
        "log_interval": 1,
        "dataset": dataset.resolve(),  # joined to its own data folder, an absolute path stands
        **settings,
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return run_process([sys.executable, "train.py", *arguments], cwd=checkout, watch=watch)


def iterations(finished: Finished) -> list[Iteration]:
    """What it printed of its iterations; the first one's time includes an evaluation."""
    return [found for line in finished.lines if (found := iteration(line))]


def iteration(line: Line) -> Iteration | None:
    """The iteration that `line` tells of, if it does."""
    match = re.match(r"iter (\d+): loss (\S+), time ([\d.]+)ms", line.text)
    if match is None:
        return None
    return Iteration(int(match[1]), float(match[2]), float(match[3]) / 1000, line.seconds)


def load_checkpoint(path: Path) -> TinyStoriesForCausalLM:
    """The model of its ckpt.pt, which is read without running anything in it."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return from_state_dict(checkpoint["model"], checkpoint["model_args"])


def from_state_dict(
    weights: Mapping[str, torch.Tensor], args: Mapping[str, int | bool]
) -> TinyStoriesForCausalLM:
    """nanoGPT's weights and its `model_args` as a model of our gpt family; to the bit the same function.

    Without biases only, which is its default.
    """
    if args["bias"]:
        raise ValueError("nanoGPT's biases are not mapped; train it with --bias=False, its default")
    config = TinyStoriesConfig(
        family="gpt",
        vocab_size=args["vocab_size"],
        num_hidden_layers=args["n_layer"],
        num_attention_heads=args["n_head"],
        hidden_size=args["n_embd"],
        max_position_embeddings=args["block_size"],
        hidden_act="gelu",  # the exact one, where GPT-2's is an approximation
    )
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    ours = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "lm_head.weight": weights["transformer.wte.weight"],
        "model.embed_positions.weight": weights["transformer.wpe.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
    }
    for number in range(config.num_hidden_layers):
        theirs, layer = f"transformer.h.{number}", f"model.layers.{number}"
        projections = weights[f"{theirs}.attn.c_attn.weight"].split(config.hidden_size)
        for name, projection in zip("qkv", projections, strict=True):
            ours[f"{layer}.self_attn.{name}_proj.weight"] = projection
        ours[f"{layer}.self_attn.o_proj.weight"] = weights[f"{theirs}.attn.c_proj.weight"]
        ours[f"{layer}.mlp.up_proj.weight"] = weights[f"{theirs}.mlp.c_fc.weight"]
        ours[f"{layer}.mlp.down_proj.weight"] = weights[f"{theirs}.mlp.c_proj.weight"]
        ours[f"{layer}.input_layernorm.weight"] = weights[f"{theirs}.ln_1.weight"]
        ours[f"{layer}.post_attention_layernorm.weight"] = weights[f"{theirs}.ln_2.weight"]
    model = TinyStoriesForCausalLM(config)
    model.load_state_dict(ours)
    return model.eval()
