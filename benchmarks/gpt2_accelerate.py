"""Train GPT2LMHeadModel in a plain Accelerate loop: a peer of `train.py`, in a separate process.

    python benchmarks/gpt2_accelerate.py --tokens FILE --vocab_size 10000 --compile

Uses its fastest settings: bf16 autocast, PyTorch's attention, fused AdamW, no dropout. Prints a line per step
in nanoGPT's format.
"""

import argparse
import time

import numpy as np
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", required=True, help="token ids in uint16, without a header")
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16, help="sequences per step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=args.precision)
    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=args.seq_len,
        n_embd=args.hidden,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    if args.compile:
        model = torch.compile(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    tokens = np.memmap(args.tokens, dtype="<u2", mode="r")
    rng = np.random.default_rng(0)
    for step in range(args.steps):
        started_s = time.perf_counter()
        starts = rng.integers(len(tokens) - args.seq_len, size=args.batch_size)
        rows = tokens[starts[:, None] + np.arange(args.seq_len)].astype(np.int64)
        ids = torch.from_numpy(rows).to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the step, before the clock is read
        print(f"iter {step}: loss {value:.4f}, time {1000 * (time.perf_counter() - started_s):.2f}ms")


if __name__ == "__main__":
    main()
