"""Options of the evaluate command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Score causal language models on stories: loss, perplexity, bits per byte and accuracy."""

    model: list[str] | str
    """Model folder (RUN/best), GGUF file or Hub id of any causal language model, or one at a revision
    (RUN@step512); several (`--model M N`, or repeated) are compared, on stories that none was trained on."""
    data: str
    """`builtin`, a named set, a Hub dataset id, or a local file or folder (parquet, CSV, JSON, text)."""
    subset: str | None = None
    """Configuration of a Hub dataset, or of a folder whose README.md lists several; null for the default."""
    split: str = "validation"
    """Split of the data. A missing `validation` is what the model's run held out of these data; data that the
    model was not trained on are scored in full if they have one split."""
    batch_size: int = 32
    """Windows per forward pass; changes speed and memory, not the scores."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """dtype of weights and computation; bfloat16 is faster on a GPU and changes the scores slightly; int8
    scores the weights that `generate --dtype int8` uses, in float32."""
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
