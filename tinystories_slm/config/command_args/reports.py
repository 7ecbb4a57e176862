"""Options of the commands that write reports: of a run, of generated stories, of data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tinystories_slm.config.command_args.publish import check_repo_id
from tinystories_slm.config.run_config import RunConfig
from tinystories_slm.config.sampling_params import SamplingOptions
from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Write the HTML report of a run."""

    run: Path = Path("runs/quickstart")
    """Run directory of a finished or active run; `report.html` is written into it."""

    def __post_init__(self) -> None:
        expand_home(self)


@dataclass(frozen=True, kw_only=True)
class ReportCardArgs(SamplingOptions):
    """Measure the stories that a model generates, and write a page (HTML) and the figures (JSON)."""

    model: str
    """Model folder (RUN/best), GGUF file or Hub id of any causal language model."""
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
    memorization: bool = True
    """Compare each story with every training story."""
    judge: str | None = None
    """Model that marks and compares the stories: its name at `judge_url`, or a model folder, GGUF file or Hub
    id."""
    judge_url: str | None = None
    """Base URL of an OpenAI-compatible endpoint (`http://127.0.0.1:8000/v1`); null for a local model."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key of the endpoint, which is written nowhere."""
    judge_stories: int = 40
    """Stories of each model, and held-out stories, that are judged."""
    judge_repeats: int = 2
    """Marks of each story, to measure how much they vary."""
    judge_requests_per_minute: int = 60
    """Requests to `judge_url` that are started in a minute, at most."""
    judge_concurrency: int = 4
    """Requests to `judge_url` that wait at the same time, or stories that a local judge reads at once."""
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
        super().__post_init__()
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
            check_repo_id("push", self.push)
        for name in ("private", "license"):
            if getattr(self, name) and self.push is None:
                raise UserError(
                    f"{name} ({getattr(self, name)}) has no effect without push; add --push USER/NAME"
                )
