"""Train a model of the built-in corpus with TRL's GRPO; the reward is 1 for a story that the grammar accepts.

    python benchmarks/grpo.py --model runs/quickstart/best --output runs/grpo --max_steps 100

Prints the share of accepted stories at temperature 1 before and after, with the 95% interval of a binomial
share (Wilson), and the mean reward of each step. Needs `pip install 'tinystories_slm[finetune]'`.
"""

import argparse
from functools import partial
from math import sqrt

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tinystories_slm  # noqa: F401 (registers the class of `custom`)
from tinystories_slm.grammar import diagnose

PROMPT = "Once upon a time"
_BATCH = 32


def main(argv: list[str] | None = None) -> list[tuple[int, int]]:
    """Return the accepted and the generated stories, before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder of the built-in corpus")
    parser.add_argument("--output", required=True, help="folder for the trained model")
    parser.add_argument("--max_steps", type=int, default=100, help="optimizer steps of 32 stories each")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--num_stories", type=int, default=512, help="stories of each share")
    parser.add_argument("--max_new_tokens", type=int, default=240, help="longest story")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    count = partial(count_accepted, tokenizer=tokenizer, args=args)
    shares = [(count(model), args.num_stories)]
    print(f"before: {format_share(*shares[0])}", flush=True)
    train(model, tokenizer, args)
    shares.append((count(model), args.num_stories))
    print(f"after:  {format_share(*shares[1])}")
    return shares


def reward_accepted(completions: list[str], **columns) -> list[float]:
    """Return 1 for each completion of `PROMPT` that is a story of the grammar, otherwise 0."""
    return [float(diagnose(PROMPT + text).position is None) for text in completions]


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=_BATCH,
        num_generations=_BATCH,
        max_completion_length=args.max_new_tokens,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        temperature=1.0,
        beta=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": [PROMPT] * _BATCH})
    trainer = GRPOTrainer(
        model, reward_funcs=reward_accepted, args=config, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    print("mean reward of each step:", *(f"{reward:.2f}" for reward in rewards))
    trainer.save_model(args.output)


@torch.no_grad()
def count_accepted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> int:
    """Return how many of `args.num_stories` sampled stories the grammar accepts."""
    model.eval()
    accepted = 0
    for start in range(0, args.num_stories, _BATCH):
        ids = tokenizer([PROMPT] * min(_BATCH, args.num_stories - start), return_tensors="pt")
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        texts = model.generate(**ids.to(model.device), max_new_tokens=args.max_new_tokens, **options)
        stories = tokenizer.batch_decode(texts, skip_special_tokens=True)
        accepted += sum(diagnose(story).position is None for story in stories)
    return accepted


def format_share(count: int, total: int) -> str:
    low, high = wilson_interval(count, total)
    return f"{count} of {total} stories accepted, {count / total:.1%} ({low:.1%} to {high:.1%})"


def wilson_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a binomial share (Wilson, 1927), 95% by default."""
    share, extra = count / total, z * z / total
    center = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * sqrt(share * (1 - share) / total + extra / (4 * total))
    return center - half, center + half


if __name__ == "__main__":
    main()
