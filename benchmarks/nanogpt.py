"""Run nanoGPT as a peer: its own train.py, unmodified, from a checkout that the user names.

This project contains no code of nanoGPT. Token files are converted at run time, printed lines are parsed, and
the weights of a checkpoint are loaded into our gpt2 family, which computes the same function.
"""

import json
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import Line, ProcessResult, run_process

from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM


@dataclass(frozen=True)
class Iteration:
    """One iteration, as nanoGPT prints it."""

    number: int
    loss: float
    step_seconds: float
    at_seconds: float
    """Time of the line, after the start of the process."""


def write_data(prepared: Path, folder: Path) -> Path:
    """Convert our token files in `prepared` to nanoGPT's: train.bin and val.bin in uint16, meta.pkl.

    Raises:
        ValueError: the vocabulary does not fit 16 bits.
    """
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
    options: Mapping[str, object],
    *,
    watch: Callable[[Line], None] = lambda line: None,
) -> ProcessResult:
    """Run its train.py on the CPU, with the CPU flags of its README and `options`.

    One batch per step (its default, for GPUs, accumulates 40). Evaluations use one batch, because their
    estimate is not compared.
    """
    flags = {
        "device": "cpu",
        "compile": False,
        "gradient_accumulation_steps": 1,
        "eval_iters": 1,
        "log_interval": 1,
        "dataset": dataset.resolve(),  # an absolute path replaces its own data folder
        **options,
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return run_process([sys.executable, "train.py", *arguments], cwd=checkout, watch=watch)


def read_iterations(done: ProcessResult) -> list[Iteration]:
    """Parse all printed iterations; the time of the first one includes an evaluation."""
    return [found for line in done.lines if (found := parse_iteration(line))]


def parse_iteration(line: Line) -> Iteration | None:
    """Parse the iteration of a printed line; None for any other line."""
    match = re.match(r"iter (\d+): loss (\S+), time ([\d.]+)ms", line.text)
    if match is None:
        return None
    return Iteration(int(match[1]), float(match[2]), float(match[3]) / 1000, line.seconds)


def load_checkpoint(path: Path) -> TinyStoriesForCausalLM:
    """Load the model of its ckpt.pt, without executing any code in the file."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return from_state_dict(checkpoint["model"], checkpoint["model_args"])


def from_state_dict(
    weights: Mapping[str, torch.Tensor], args: Mapping[str, int | bool]
) -> TinyStoriesForCausalLM:
    """Load nanoGPT's weights and `model_args` into our gpt2 family, which computes the same function.

    Raises:
        ValueError: the weights have biases; nanoGPT's default has none.
    """
    if args["bias"]:
        raise ValueError(
            "bias (True): nanoGPT's biases cannot be mapped; train it with --bias=False, its default"
        )
    config = TinyStoriesConfig(
        family="gpt2",
        vocab_size=args["vocab_size"],
        num_hidden_layers=args["n_layer"],
        num_attention_heads=args["n_head"],
        hidden_size=args["n_embd"],
        max_position_embeddings=args["block_size"],
        hidden_act="gelu",  # the exact one; GPT-2 uses an approximation
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
