"""Options of the generate command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinystories_slm.config.sampling_params import SamplingOptions
from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError

Backend = Literal["auto", "hf", "torch", "cpu"]
"""Generation loop. hf: the loop of transformers; torch: the loop of this project with torch operations; cpu:
the same loop with compiled CPU kernels; auto: the last of these that supports the model."""


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(SamplingOptions):
    """Generate text from prompts with a causal language model."""

    model: str
    """Model folder (RUN/best), GGUF file or Hub id of any causal language model."""
    prompt: str | None = None
    """Prompt of each completion; null for `Once upon a time`."""
    prompts: Path | None = None
    """File of prompts, one per line (.jsonl, or .json with a list: the "prompt" of each); `-` for standard
    input."""
    words: str | None = None
    """Words of the story, separated by commas (`ball, sad`), for a model that was trained on blocks of
    TinyStories-Instruct. It and the next three options are the prompt, together or alone."""
    features: str | None = None
    """Features of the story, separated by commas: BadEnding, Conflict, Dialogue, Foreshadowing, MoralValue,
    Twist."""
    summary: str | None = None
    """Summary of the story."""
    random_sentence: str | None = None
    """A sentence of the story."""
    num_stories: int = 1
    """Completions per prompt, with the seeds seed, seed + 1, ..."""
    seed: int | None = None
    """Seed of the first completion of each prompt; it determines the text. null for a random seed."""
    finish_sentence: bool = False
    """Cut a completion without a stop token after its last complete sentence."""
    stream: bool = False
    """Print text while the model generates it, one completion after another."""
    batch_size: int = 64
    """Completions generated at the same time without stream; affects speed and memory, not the text."""
    output: Path | None = None
    """JSONL file for completions and sampling parameters; replaces an existing file. null for none."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; auto uses cuda, else mps, else cpu."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """dtype of weights and computation; bfloat16 is faster for large batches, int8 (weights only) for one
    story on a CPU, and both generate other text."""
    backend: Backend = "auto"
    """Generation loop: of transformers (hf), of this project (torch), or of this project with compiled CPU
    kernels (cpu); auto uses the last of these that supports the model, and the log names it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""
    trust_remote_code: bool = False
    """Run the code in the model's folder if transformers has no class for the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self)
        for name in ("num_stories", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed ({self.seed}) must be between 0 and 9223372036854775807")
        if self.prompt is not None and any("\ud800" <= char <= "\udfff" for char in self.prompt):
            raise UserError("prompt is not valid UTF-8; set the terminal to UTF-8")
        if self.prompt == "-":
            raise UserError("prompt (-) cannot be standard input; use --prompts -")
        if self.prompt is not None and self.prompts is not None:
            raise UserError(
                f"prompt ({self.prompt!r}) and prompts ({self.prompts}) cannot be combined; use one of them"
            )
        self._check_block_options()
        if self.output is not None and self.output.is_dir():
            raise UserError(f"output ({self.output}) is a folder; set a file path")
        if self.output is not None and not self.output.parent.is_dir():
            raise UserError(
                f"output ({self.output}) cannot be written: its folder does not exist; "
                f"create {self.output.parent}"
            )

    def block_options(self) -> dict[str, str]:
        """Return the options that are parts of a block and are set."""
        names = ("words", "features", "summary", "random_sentence")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _check_block_options(self) -> None:
        for name, value in self.block_options().items():
            for other in ("prompt", "prompts"):
                if getattr(self, other) is not None:
                    raise UserError(f"{name} ({value}) is a prompt of its own; remove {other}")
