"""What scripts/generate.py does: prompts from the command line, stories to the screen and to a file."""

import json
import logging
import secrets
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.errors import InputError
from tinystories_slm.generation.decoding import Decoding, choose_decoding
from tinystories_slm.generation.prompts import read_prompts
from tinystories_slm.generation.sampling import Sampling
from tinystories_slm.generation.telling import Beginning, Story, StoryStream, begin, tell_stories
from tinystories_slm.model_folder import load_model_folder

logger = logging.getLogger(__name__)

PROMPT = "Once upon a time"
_RULE = "\n\n---\n\n"


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Tell stories with a causal language model."""

    model: str
    """Model folder (RUN/best) or Hub id of any causal language model."""
    prompt: str | None = None
    """How each story begins; null for `Once upon a time`."""
    prompts: Path | None = None
    """File of prompts, one per line (.jsonl: the "prompt" of each line); `-` for standard input."""
    num_stories: int = 1
    """Stories told of each prompt, with seed, seed + 1, ..."""
    max_new_tokens: int = 256
    """Tokens added to the prompt at most; a story also ends where the model's context does."""
    temperature: float = 0.8
    """Divides the logits: below 1 safer, above 1 wilder; 0 takes the likeliest token each time."""
    top_k: int = 50
    """Draw from the so many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 for all."""
    min_p: float = 0.0
    """Draw from the tokens at least so likely as this share of the likeliest; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that the story, after its prompt, has used already; 1 for not."""
    seed: int | None = None
    """Makes the stories exact; null for new ones each time."""
    finish_sentence: bool = False
    """Cut a story that max_new_tokens ended after its last full sentence."""
    stream: bool = False
    """Print as it is written, one story after another."""
    batch_size: int = 64
    """Stories told at once where they are not streamed; changes speed and memory, not the stories."""
    output: Path | None = None
    """JSONL file for the stories and their settings, replaced whole; null for none."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model computes; auto takes cuda, else mps, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and computation; bfloat16 is faster for many stories, and tells others."""
    decoding: Decoding = "auto"
    """The loop: transformers' own (plain), ours (torch), ours with compiled kernels (native); auto takes the
    last of these that can decode the model, and says which."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    trust_remote_code: bool = False
    """Run the code that a model brings along, if it is none of transformers' own classes."""

    def __post_init__(self) -> None:
        for name in ("num_stories", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed ({self.seed}) must lie between 0 and 9223372036854775807")
        if self.prompt is not None and any("\ud800" <= char <= "\udfff" for char in self.prompt):
            raise InputError("prompt is not valid UTF-8; type it in a terminal that is set to UTF-8")
        if self.prompt == "-":
            raise InputError("prompt is -; for prompts from standard input write --prompts -")
        if self.prompt is not None and self.prompts is not None:
            raise InputError(
                f"prompt ({self.prompt!r}) and prompts ({self.prompts}) are both given; drop one"
            )
        if self.output is not None and self.output.is_dir():
            raise InputError(f"output ({self.output}) is a folder; name a file in it")
        if self.output is not None and not self.output.parent.is_dir():
            raise InputError(
                f"output ({self.output}) lies in no folder that exists; create {self.output.parent}"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        """The knobs of sampling alone."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


def generate(args: GenerateArgs) -> list[Story]:
    """Print `args.num_stories` stories of each prompt, and write them to `args.output`.

    Raises:
        InputError: prompts or model cannot be loaded, or a prompt fills the model's context.
    """
    prompts = [PROMPT if args.prompt is None else args.prompt]
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    model, tokenizer = load_model_folder(
        args.model,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=args.dtype,
    )
    first = secrets.randbelow(10_000) if args.seed is None else args.seed
    seeds = range(first, first + args.num_stories)
    way, reason = choose_decoding(model, args.decoding)
    logger.info(
        "model %s on %s, seed %s; %s decoding%s, %s, %d threads",
        args.model, model.device, first, way, f" ({reason})" if reason else "", args.dtype,
        torch.get_num_threads(),
    )  # fmt: skip
    beginnings = begin(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in seeds],
        [seed for _ in prompts for seed in seeds],
        args.sampling(),
    )
    tell = _stream if args.stream else _tell
    with _replacing(args.output) as file, closing(tell(model, tokenizer, beginnings, args)) as stories:
        told = []
        for story in stories:
            if file is not None:
                file.write(_line(story, args.model, args.sampling()))
            told.append(story)
    if args.output is not None:
        logger.info("written to %s", args.output)
    return told


def write_stories(path: Path, stories: Iterable[Story], model: str, sampling: Sampling) -> None:
    """Replace the JSONL file `path` by these stories."""
    with _replacing(path) as file:
        for story in stories:
            file.write(_line(story, model, sampling))


def _line(story: Story, model: str, sampling: Sampling) -> str:
    """Of stories.jsonl: the story and all that tells it again."""
    record = {
        "prompt": story.prompt,
        "story": story.text,
        "model": model,
        "seed": story.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "num_new_tokens": story.num_new_tokens,
        "finished": story.finished,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _tell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: list[Beginning],
    args: GenerateArgs,
) -> Iterator[Story]:
    stories = tell_stories(
        model,
        tokenizer,
        beginnings,
        args.sampling(),
        batch_size=args.batch_size,
        finish_sentence=args.finish_sentence,
        decoding=args.decoding,
    )
    for number, story in enumerate(stories):
        print(_RULE if number else "", story.text, sep="", end="", flush=True)
        yield story
    print(flush=True)


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: list[Beginning],
    args: GenerateArgs,
) -> Iterator[Story]:
    for number, beginning in enumerate(beginnings):
        print(_RULE if number else "", end="")
        stream = StoryStream(
            model,
            tokenizer,
            beginning,
            args.sampling(),
            finish_sentence=args.finish_sentence,
            decoding=args.decoding,
        )
        with closing(iter(stream)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        yield stream.story
    print(flush=True)


@contextmanager
def _replacing(path: Path | None) -> Iterator[TextIO | None]:
    """A file that takes the place of `path` at the end; also after an interruption, with the lines it has."""
    if path is None:
        yield None
        return
    partial = path.with_name(path.name + ".partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"output ({path}) cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
    finally:
        if partial.stat().st_size:
            partial.replace(path)
        else:
            partial.unlink()
