"""Options of the commands that are not a run's: evaluate, generate, export, push, reports, demo, doctor.

Nothing here imports torch or transformers, so that `--help` prints without them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tinystories_slm.config.run_config import RunConfig
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError

Backend = Literal["auto", "hf", "torch", "cpu"]
"""Generation loop. hf: the loop of transformers; torch: the loop of this project with torch operations; cpu:
the same loop with compiled CPU kernels; auto: the last of these that supports the model."""


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Generate text from prompts with a causal language model."""

    model: str
    """Model folder (RUN/best) or Hub id of any causal language model."""
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
    max_new_tokens: int = 256
    """Maximum number of new tokens; a completion also ends where the model's context is full."""
    temperature: float = 0.8
    """Divisor of the logits: below 1 less random, above 1 more random; 0 selects the most probable token."""
    top_k: int = 50
    """Sample from the top_k most probable tokens; 0 for all."""
    top_p: float = 0.95
    """Sample from the most probable tokens with this total probability; 1 for all."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the largest probability; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1, reduce the scores of tokens that the completion already contains; 1 for no penalty."""
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of weights and computation; bfloat16 is faster for large batches and generates other text."""
    backend: Backend = "auto"
    """Generation loop: of transformers (hf), of this project (torch), or of this project with compiled CPU
    kernels (cpu); auto uses the last of these that supports the model, and the log names it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""
    trust_remote_code: bool = False
    """Run the code in the model's folder if transformers has no class for the model."""

    def __post_init__(self) -> None:
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
        self.sampling()

    def block_options(self) -> dict[str, str]:
        """Return the options that are parts of a block and are set."""
        names = ("words", "features", "summary", "random_sentence")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _check_block_options(self) -> None:
        for name, value in self.block_options().items():
            for other in ("prompt", "prompts"):
                if getattr(self, other) is not None:
                    raise UserError(f"{name} ({value}) is a prompt of its own; remove {other}")

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Score causal language models on stories: loss, perplexity, bits per byte and accuracy."""

    model: list[str] | str
    """Model folder (RUN/best) or Hub id of any causal language model, or one at a revision (RUN@step512);
    several (`--model M N`, or repeated) are compared, on stories that none of them was trained on."""
    data: str
    """`builtin`, a named set, a Hub dataset id, or a local file or folder (parquet, CSV, JSON, text)."""
    subset: str | None = None
    """Configuration of a Hub dataset, or of a folder whose README.md lists several; null for the default."""
    split: str = "validation"
    """Split of the data. A missing `validation` is what the model's run held out of these data; data that the
    model was not trained on are scored in full if they have one split."""
    batch_size: int = 32
    """Windows per forward pass; changes speed and memory, not the scores."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of weights and computation; bfloat16 is faster on a GPU and changes the scores slightly."""
    max_stories: int | None = None
    """Number of stories to score, from the start of the split; null for all."""
    tasks: str | None = None
    """Further measurements, of 16 stories that the model generates, separated by commas: `ended`, `grammar`;
    or of stories for the prompts of the data: `instruct`. See `train.eval_tasks` of a run."""
    output: Path | None = None
    """File for the scores: JSON with all of them, or with the suffix .csv or .md a table; null for none."""
    plot: Path | None = None
    """PNG or SVG file for a plot of bits per byte against parameters; null for none."""
    end_token: Literal["auto", "scored", "unscored"] = "auto"
    """Whether the model's end token is scored after each story; auto leaves it out for a model that did not
    see it in training."""
    text_column: str = "text"
    """Column (parquet, CSV) or key (JSON) that holds the story."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null for its newest commit."""
    validation_split: Literal["auto", "holdout"] | None = None
    """As `data.validation_split` of a run; null for that of the run on these data, else `auto`."""
    validation_fraction: float | None = None
    """As `data.validation_fraction` of a run; null for that of the run on these data, else 0.05."""
    model_revision: str | None = None
    """As `@REVISION` after the name of each model: a branch, tag or commit of a Hub model, or a kept step of
    a run directory (`step512`); null for the newest commit."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; auto selects cuda, else mps, else cpu."""
    trust_remote_code: bool = False
    """Run the model's own code if transformers has no class for it."""

    def __post_init__(self) -> None:
        expand_home(self)
        for name in ("batch_size", "max_stories"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} ({value}) must be at least 1")
        if self.validation_fraction is not None and not 0.0 < self.validation_fraction < 1.0:
            raise UserError(
                f"validation_fraction ({self.validation_fraction}) must be between 0 and 1; try 0.05"
            )
        for name in ("output", "plot"):
            path = getattr(self, name)
            if path is not None and path.is_dir():
                raise UserError(f"{name} ({path}) is a folder; use the path of a file")
            if path is not None and not path.parent.is_dir():
                raise UserError(f"{name} ({path}) is in a folder that does not exist; create {path.parent}")
        if self.plot is not None and self.plot.suffix.lower() not in (".png", ".svg"):
            raise UserError(f"plot ({self.plot}): must end in .png or .svg; use another name")
        if not self.models:
            raise UserError("model ([]): must name a model; set --model")

    @property
    def models(self) -> list[str]:
        """Models to score, in order; the others are compared with the first."""
        return [self.model] if isinstance(self.model, str) else list(self.model)


@dataclass(frozen=True, kw_only=True)
class SurprisalArgs:
    """Write loss, rank and entropy of each token of stories under a causal language model, as parquet.

    The stories, their start and end, and the windows of long ones are those of `evaluate`.
    """

    model: str
    """Model folder (RUN/best) or Hub id of any causal language model, or one at a revision (RUN@step512)."""
    data: str
    """`builtin`, a named set, a Hub dataset id, or a local file or folder (parquet, CSV, JSON, text)."""
    subset: str | None = None
    """Configuration of a Hub dataset, or of a folder whose README.md lists several; null for the default."""
    split: str = "validation"
    """Split of the data, as for `evaluate`."""
    max_stories: int | None = None
    """Number of stories to score, from the start of the split; null for all."""
    text_column: str = "text"
    """Column (parquet, CSV) or key (JSON) that holds the story."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null for its newest commit."""
    output: Path = Path("surprisal.parquet")
    """File to write, with a row for each token. An interrupted command continues it."""
    plot_story: int | None = None
    """Story, from 0, that is drawn with its surprisal, in an HTML page beside `output`; null for none."""
    batch_size: int = 32
    """Windows per forward pass; changes speed and memory, and the scores by rounding errors."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of weights and computation; bfloat16 is faster on a GPU and changes the scores slightly."""
    end_token: Literal["auto", "scored", "unscored"] = "auto"
    """Whether the model's end token is scored after each story, as for `evaluate`."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; auto selects cuda, else mps, else cpu."""
    trust_remote_code: bool = False
    """Run the model's own code if transformers has no class for it."""

    def __post_init__(self) -> None:
        expand_home(self)
        for name, minimum in (("batch_size", 1), ("max_stories", 1), ("plot_story", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"{name} ({value}) must be at least {minimum}")
        if self.output.suffix.lower() != ".parquet" or self.output.is_dir():
            raise UserError(
                f"output ({self.output}): must end in .parquet; use one such as surprisal.parquet"
            )
        if not self.output.parent.is_dir():
            raise UserError(
                f"output ({self.output}) is in a folder that does not exist; create {self.output.parent}"
            )


@dataclass(frozen=True, kw_only=True)
class ExposureArgs:
    """Measure how far a run memorized its canaries (`data.canaries`) at each kept step."""

    run: Path
    """Run directory; the models in steps/ (`train.keep`) and last/ are measured."""
    num_alternatives: int = 1000
    """Other fillings with which the loss of a canary is compared, at most; all of them give an exact rank."""
    seed: int = 0
    """Seed of the choice of alternatives."""
    output: Path | None = None
    """JSON file for the result; null for RUN/exposure.json."""
    batch_size: int = 128
    """Texts per forward pass; changes speed and memory, and the scores by rounding errors."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; auto selects cuda, else mps, else cpu."""

    def __post_init__(self) -> None:
        expand_home(self)
        for name, minimum in (("num_alternatives", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Export a trained model to a format of other tools, and check that it computes the same."""

    model: str
    """Model folder (RUN/best) or Hub id of a model that was trained here."""
    format: Literal["custom", "native", "gguf", "llama2c", "onnx"]
    """`custom`: with this project's model code; `native`: as the GPT-2, Llama or Qwen3 class of transformers;
    `gguf`: for llama.cpp; `llama2c`: for `run` of llama2.c; `onnx`: for onnxruntime and the browser."""
    output: Path
    """Folder to write; an existing one must be empty or an earlier export, whose files are replaced; all
    other files stay."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in `custom` and `native`."""
    quantization: Literal["f32", "f16", "q8_0"] = "f16"
    """Type of the weights in `gguf`."""
    vendor: bool = False
    """Copy the JavaScript libraries of the `onnx` page into the export with npm; without it the page loads
    them from jsdelivr.net."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""

    def __post_init__(self) -> None:
        expand_home(self)
        if self.dtype != "float32" and self.format not in ("custom", "native"):
            raise UserError(f"dtype ({self.dtype}) applies to custom and native, not {self.format}; omit it")
        if self.quantization != "f16" and self.format != "gguf":
            raise UserError(f"quantization ({self.quantization}) applies to gguf, not {self.format}; omit it")
        if self.vendor and self.format != "onnx":
            raise UserError(f"vendor (True) applies to onnx, not {self.format}; omit it")


@dataclass(frozen=True, kw_only=True)
class PushArgs:
    """Publish a run on the Hugging Face Hub as one commit, with the token of `hf auth login` or HF_TOKEN."""

    run: Path | None = None
    """Run directory; its best/ holds the model. Required, except with `code_only`."""
    repo_id: str
    """USER/NAME of the repository, which is created if it does not exist."""
    private: bool = False
    """Create the repository as private; an existing public repository is an error."""
    format: str = "custom,native"
    """`custom`: with this project's code; `native`: as a class of transformers; with both, `native` is in
    the folder native/."""
    revision: str | None = None
    """Tag for the commit (`v1`); an existing tag is never moved."""
    license: str | None = None
    """License of the model, by its identifier on the Hub (`mit`); null for none."""
    all_steps: bool = False
    """Also push each model in RUN/steps as a branch: `step512` of the optimizer step 512."""
    code_only: bool = False
    """Update only the model's code files in an existing repository, in one commit; weights, card and
    records stay. Use it if the published code is older than the installed transformers of its users."""
    dry_run: bool = False
    """List every file with its size and stop, without a request to the Hub."""

    def __post_init__(self) -> None:
        expand_home(self)
        _check_repo_id("repo_id", self.repo_id)
        unknown = [name for name in self.formats if name not in ("custom", "native")]
        if unknown or not self.formats:
            raise UserError(f"format ({self.format}) must be custom, native or custom,native")
        if self.run is None and not self.code_only:
            raise UserError("run is missing; use --run RUN with a run directory")
        if self.code_only:
            for name in ("run", "private", "format", "license", "all_steps"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UserError(
                        f"{name} ({getattr(self, name)}) has no effect with code_only; remove one of them"
                    )
        if self.revision is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.revision):
            raise UserError(f"revision ({self.revision}) is not a valid tag; use one such as v1")

    @property
    def formats(self) -> list[str]:
        return [name.strip() for name in self.format.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Write the HTML report of a run."""

    run: Path = Path("runs/quickstart")
    """Run directory of a finished or active run; `report.html` is written into it."""

    def __post_init__(self) -> None:
        expand_home(self)


@dataclass(frozen=True, kw_only=True)
class ReportCardArgs:
    """Measure the stories that a model generates, and write a page (HTML) and the figures (JSON)."""

    model: str
    """Model folder (RUN/best) or Hub id of any causal language model."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""
    baseline: list[str] = field(default_factory=list)
    """Further models, measured in the same way; `--baseline M N@step512`, or repeated."""
    data: str | None = None
    """Stories to compare with, as for `evaluate`; null for what the model was trained on."""
    subset: str | None = None
    """Configuration of a Hub dataset, or of a folder whose README.md lists several; null for the default."""
    split: str = "validation"
    """Split of the data, as for `evaluate`: by default stories that were held out of training."""
    text_column: str = "text"
    """Column (parquet, CSV) or key (JSON) that holds the story."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null for its newest commit."""
    output: Path = Path("report_card.html")
    """Page to write; the figures and all stories are written beside it, with the ending .json."""
    num_stories: int = 300
    """Stories per model, and held-out stories: 20 prompts in turn, with the seeds seed, seed + 1, ..."""
    seed: int = 0
    """Seed of the first story; each story has its own."""
    max_new_tokens: int = 512
    """Maximum number of new tokens; a story also ends where the model's context is full."""
    temperature: float = 0.8
    """Divisor of the logits: below 1 less random, above 1 more random; 0 selects the most probable token."""
    top_k: int = 50
    """Sample from the top_k most probable tokens; 0 for all."""
    top_p: float = 0.95
    """Sample from the most probable tokens with this total probability; 1 for all."""
    memorization: bool = True
    """Compare each story with every training story."""
    judge: str | None = None
    """Model that marks and compares the stories: its name at `judge_url`, or a model folder or Hub id."""
    judge_url: str | None = None
    """Base URL of an OpenAI-compatible endpoint (`http://127.0.0.1:8000/v1`); null for a local model."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key of the endpoint, which is written nowhere."""
    judge_stories: int = 40
    """Stories of each model, and held-out stories, that are judged."""
    judge_repeats: int = 2
    """Marks of each story, to measure how much they vary."""
    judge_requests_per_minute: int = 60
    """Requests that are started in a minute, at most."""
    judge_concurrency: int = 4
    """Requests that wait for their answer at the same time."""
    judge_timeout_s: float = 60.0
    """Seconds until a request without an answer is repeated."""
    judge_cache: Path | None = None
    """JSON Lines file of answers, which are not requested again; null for the output with .judge.jsonl."""
    judge_estimate: bool = False
    """Print the number of requests and tokens, and stop before the first one."""
    arena: bool = False
    """Compare stories of the models and held-out ones blind in the terminal, instead of writing a card; votes
    are kept in the output with .votes.jsonl."""
    batch_size: int = 64
    """Stories generated at the same time; affects speed and memory, not the text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; auto uses cuda, else mps, else cpu."""
    trust_remote_code: bool = False
    """Run the model's own code if transformers has no class for it."""

    def __post_init__(self) -> None:
        expand_home(self)
        if self.num_stories < 10:
            raise UserError(f"num_stories ({self.num_stories}): must be at least 10; use 300")
        for name in (
            *("batch_size", "judge_stories", "judge_repeats", "judge_requests_per_minute"),
            *("judge_concurrency", "judge_timeout_s"),
        ):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least 1")
        self._check_judge()
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed ({self.seed}) must be between 0 and 4294967295")
        if self.output.suffix.lower() != ".html" or self.output.is_dir():
            raise UserError(f"output ({self.output}): must be the path of a page; use one such as card.html")
        if not self.output.parent.is_dir():
            raise UserError(
                f"output ({self.output}) is in a folder that does not exist; create {self.output.parent}"
            )
        self.sampling()

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    @property
    def judge_cache_path(self) -> Path:
        """File of the answers of the judge."""
        return self.judge_cache or self.output.with_suffix(".judge.jsonl")

    def _check_judge(self) -> None:
        if self.judge is None:
            for name in ("judge_url", "judge_estimate"):
                if getattr(self, name):
                    raise UserError(
                        f"{name} ({getattr(self, name)}) has no effect without judge; set --judge"
                    )
            return
        if self.judge_url is None:
            return
        parts = urlsplit(self.judge_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(
                f"judge_url ({parts.scheme}:...): must start with http:// or https:// and a host; correct it"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError(
                f"judge_url (...{parts.path}): must not contain a password or a query; "
                f"put the key into the environment variable {self.judge_key_env}"
            )


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Serve a web page on which models generate stories, or write it as a Space of the Hub."""

    model: list[str] | str
    """Model folder (RUN/best) or Hub id of any causal language model; repeat it for several models, side by
    side and in a blind comparison."""
    host: str = "127.0.0.1"
    """Address that the page is served on; only this machine reaches the default, and `0.0.0.0` is all
    addresses."""
    port: int | None = None
    """Port of the page; null for the first free one from 7860."""
    max_new_tokens: int = 512
    """Largest length that a visitor can set, in new tokens."""
    concurrency: int = 2
    """Requests that generate at the same time; each takes the memory of one story of each model."""
    queue_size: int = 64
    """Requests that wait at the same time; more are rejected with a message."""
    report_card: Path | None = None
    """Page of `report_card` to show; null for report_card.html of the model folder or of its run."""
    votes: Path = Path("report_card.votes.jsonl")
    """JSON Lines file of votes of the blind comparison; the default is that of `report_card --arena`."""
    export_space: Path | None = None
    """Folder for the files of a Space that shows the models, which must be Hub ids; nothing is served. An
    existing folder must be empty."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, of each of several; null for the newest commit."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the models; auto uses cuda, else mps, else cpu."""
    trust_remote_code: bool = False
    """Run the models' own code if transformers has no class for them."""

    def __post_init__(self) -> None:
        expand_home(self)
        if not self.models or not all(self.models):
            raise UserError(
                f"model ({', '.join(self.models)}): must name a model; set --model RUN/best or a Hub id"
            )
        for name in ("max_new_tokens", "concurrency", "queue_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"port ({self.port}): must be between 1 and 65535; use 7860")
        if self.report_card is not None and not self.report_card.is_file():
            raise UserError(f"report_card ({self.report_card}) does not exist; write it with report_card.py")
        if not self.votes.parent.is_dir():
            raise UserError(
                f"votes ({self.votes}) is in a folder that does not exist; create {self.votes.parent}"
            )

    @property
    def models(self) -> list[str]:
        """Models to show, in order."""
        return [self.model] if isinstance(self.model, str) else list(self.model)


@dataclass(frozen=True, kw_only=True)
class InspectDataArgs:
    """Show the windows that an optimizer step read, or every step that read a story."""

    run: Path
    """Run directory; its prepared data must still be in `data.data_dir`."""
    step: int | None = None
    """Optimizer step, from 1, whose windows are shown."""
    story: int | None = None
    """Training story, by its row in `data.data_dir`/raw/train.parquet, from 0, whose steps are listed."""
    text: str | None = None
    """Text; the steps of each training story that contains it are listed."""
    output: Path | None = None
    """JSON file for the result; null for none."""

    def __post_init__(self) -> None:
        expand_home(self)
        given = [name for name in ("step", "story", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"step, story, text ({', '.join(given) or 'none'}): exactly one must be set; use --step 1"
            )
        if self.story is not None and self.story < 0:
            raise UserError(f"story ({self.story}): must be at least 0")
        if self.text == "":
            raise UserError("text (''): must not be empty")


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(RunConfig):
    """Check a configuration on this machine, without training, downloading or writing anything.

    With `--model M` (a folder or Hub id) and no configuration, check that model instead. The exit code is 0
    without problems, 1 with problems, and 2 for an invalid configuration.
    """

    output: Path | None = None
    """JSON file for the results of the checks; null for none."""


@dataclass(frozen=True, kw_only=True)
class ModelDoctorArgs:
    """Check a model with the installed packages, without writing anything.

    The exit code is 0 without problems, 1 with problems, and 2 for a model that cannot be loaded.
    """

    model: str
    """Model folder (RUN/best, an export) or Hub id of any causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""
    trust_remote_code: bool = False
    """Run the model's own code; not needed for models trained here."""
    output: Path | None = None
    """JSON file for the results of the checks; null for none."""

    def __post_init__(self) -> None:
        expand_home(self)


@dataclass(frozen=True, kw_only=True)
class StoryArgs(RunConfig):
    """Train, evaluate and generate in one go; a finished run generates another story."""

    minutes: float | None = None
    """Minutes of the whole command; every option that is not given is chosen for them (docs/planning.md).
    null for the preset."""
    more: float | None = None
    """Minutes to train a finished run on (docs/longer.md); null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_minutes(minutes=self.minutes, more=self.more)


@dataclass(frozen=True, kw_only=True)
class TrainCommandArgs(RunConfig):
    """Train a model, or resume its run."""

    minutes: float | None = None
    """Minutes of the whole command; every option that is not given is chosen for them (docs/planning.md).
    null for the options as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_minutes(minutes=self.minutes)


def _check_minutes(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} ({value}): must be a number of minutes above 0; try 10")


@dataclass(frozen=True, kw_only=True)
class DownloadArgs(RunConfig):
    """Write the stories of `data.source` to `data.data_dir`/raw, or list the named sets."""

    list: bool = False
    """Print the named sets that `data.source` takes, with repository, revision, files and license."""


@dataclass(frozen=True, kw_only=True)
class PrepareArgs(RunConfig):
    """Write the token files of `data.source` to `data.data_dir`, at once or in shards on several machines."""

    shard: str | None = None
    """RANK/WORLD: write only part RANK (0 to WORLD - 1) of WORLD parts, to `data.data_dir`/shards; null for
    the token files themselves."""
    merge_shards: int | None = None
    """Write the token files from this number of shards, and remove the shards. null for no merge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_shards is not None and self.merge_shards < 1:
            raise UserError(f"merge_shards ({self.merge_shards}): must be at least 1; use WORLD of --shard")
        if self.shard is None:
            return
        if self.merge_shards is not None:
            raise UserError(
                f"merge_shards ({self.merge_shards}): cannot be combined with shard; run it after all shards"
            )
        rank, num_shards = self.rank_and_world
        if not rank < num_shards:
            raise UserError(
                f"shard ({self.shard}): must be RANK/WORLD with RANK below WORLD; use 0/4 to 3/4 for 4 shards"
            )

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """Rank and number of shards; (0, 0) if `shard` is not of the form RANK/WORLD."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.shard or "")
        return (int(match[1]), int(match[2])) if match else (0, 0)


@dataclass(frozen=True, kw_only=True)
class DataReportArgs(RunConfig):
    """Describe the stories of `data.source`: report.html, report.json and a dataset card in `data.data_dir`.

    The stories are downloaded first if they are missing.
    """

    push: str | None = None
    """USER/NAME of a dataset on the Hub to which stories, card and report are pushed as one commit; it is
    created if it does not exist. null for no push."""
    private: bool = False
    """Create the dataset as private; an existing public one is an error."""
    license: str | None = None
    """License of the pushed stories, by its identifier on the Hub (`mit`); null for that of a named set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push is not None:
            _check_repo_id("push", self.push)
        for name in ("private", "license"):
            if getattr(self, name) and self.push is None:
                raise UserError(
                    f"{name} ({getattr(self, name)}) has no effect without push; add --push USER/NAME"
                )


def _check_repo_id(option: str, value: str) -> None:
    """Check the id of a repository on the Hub.

    Raises:
        UserError: it has no owner, or a character that the Hub does not allow.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{option} ({value}) is not valid: {reason}") from error
    if "/" not in value:
        raise UserError(f"{option} ({value}) must include the owner; use USER/{value}")


def doctor_args(argv: Sequence[str]) -> type[DoctorArgs] | type[ModelDoctorArgs]:
    """Return the class of the options in `argv`: `--model M` names a model, `--model.lr` belongs to a run."""
    names_model = any(arg == "--model" or arg.startswith("--model=") for arg in argv)
    return ModelDoctorArgs if names_model else DoctorArgs
