"""Options of the demo command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Serve a web page on which models generate stories, or write it as a Space of the Hub."""

    model: list[str] | str
    """Model folder (RUN/best), GGUF file or Hub id of any causal language model; repeat it for several
    models, side by side and in a blind comparison."""
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
