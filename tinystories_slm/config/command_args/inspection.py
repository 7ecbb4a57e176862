"""Options of the commands about what a run read and memorized."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError


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
class SurprisalArgs:
    """Write loss, rank and entropy of each token of stories under a causal language model, as parquet.

    The stories, their start and end, and the windows of long ones are those of `evaluate`.
    """

    model: str
    """Model folder (RUN/best), GGUF file or Hub id of any causal language model, or one at a revision
    (RUN@step512)."""
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
