"""Stories from prompts, through transformers' `generate()`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.errors import InputError
from tinystories_slm.model_folder import load_model_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Tell stories with a causal language model."""

    model: str
    """Model folder (RUN/best) or Hub id of any causal language model."""
    prompt: str = "Once upon a time"
    """How each story begins."""
    num_stories: int = 1
    """Stories told, in one batch."""
    max_new_tokens: int = 256
    """Tokens added to the prompt at most; a story also ends where the model's context does."""
    temperature: float = 0.8
    """Divides the logits: below 1 safer, above 1 wilder; 0 takes the likeliest token each time."""
    top_k: int = 50
    """Draw from the so many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 for all."""
    seed: int | None = None
    """Makes the stories exact; null for new ones each time."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    trust_remote_code: bool = False
    """Run the code that a model brings along, if it is none of transformers' own classes."""

    def __post_init__(self) -> None:
        if self.num_stories < 1:
            raise InputError(f"num_stories ({self.num_stories}) must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed ({self.seed}) must lie between 0 and 9223372036854775807")
        if not self.prompt.isprintable() and any("\ud800" <= char <= "\udfff" for char in self.prompt):
            raise InputError("prompt is not valid UTF-8; type it in a terminal that is set to UTF-8")
        check_sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def generate(args: GenerateArgs) -> list[str]:
    """Print `args.num_stories` stories.

    Raises:
        InputError: the model cannot be loaded, or the prompt fills its context.
    """
    model, tokenizer = load_model_folder(
        args.model, revision=args.revision, trust_remote_code=args.trust_remote_code
    )
    logger.info("model %s on %s", args.model, model.device)
    stories = generate_stories(
        model,
        tokenizer,
        [args.prompt] * args.num_stories,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print("\n\n---\n\n".join(stories))
    return stories


def generate_stories(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    seed: int | None = None,
) -> list[str]:
    """Each prompt with its continuation, up to `<|endoftext|>` or `max_new_tokens`.

    A story never outgrows the model's context: what a prompt leaves of it bounds `max_new_tokens`.
    `temperature` 0 takes the likeliest token each time; `top_k` 0 and `top_p` 1 cut nothing off.
    With a `seed` the stories are exact, and the caller's random state is left as it was.

    Raises:
        InputError: a setting outside its range, or a prompt that fills the context.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    token_ids = [_with_start(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, token_ids))
    context = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    if longest >= context:
        raise InputError(
            f"the prompt is {longest} tokens long and the model's context is {context}; shorten the prompt"
        )
    # Padding on the left, so that every continuation starts right after its prompt.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in token_ids])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in token_ids])

    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(enabled=seed is not None), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        output_ids = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=min(max_new_tokens, context - longest),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id,
            **(sampling if temperature > 0 else greedy),
        )  # (number of prompts, longest + new tokens)
    model.train(was_training)
    return tokenizer.batch_decode(output_ids, skip_special_tokens=True)


def check_sampling(*, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Refuse, as an `InputError`, what `generate()` could not mean."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    if not (temperature == 0 or 1e-3 <= temperature < float("inf")):
        raise InputError(f"temperature ({temperature}) must be 0 (greedy) or at least 0.001; try 0.8")
    if top_k < 0:
        raise InputError(f"top_k ({top_k}) must be 0 (off) or above; try 50")
    if not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p ({top_p}) must lie in (0, 1]; try 0.95, or 1 to switch it off")


def _with_start(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's ids after the token that every training story follows."""
    ids = tokenizer(prompt, verbose=False).input_ids  # its warning of a long text is our error
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if ids[:1] == [start] else [start, *ids]
