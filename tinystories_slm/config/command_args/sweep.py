"""Options of the sweep command: what a sweep file holds, and what its command line adds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinystories_slm.config.sections import expand_home, require_at_least
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SweepEvaluationArgs:
    """Stories that every model is scored on; as of `evaluate`."""

    data: str | None = None
    """Data as `evaluate --data`; null for the source that a run was trained on."""
    subset: str | None = None
    """Configuration of a Hub dataset, or of a folder whose README.md lists several."""
    split: str = "validation"
    """Split of the data; by default stories that were held out of training."""
    text_column: str = "text"
    """Column (parquet, CSV) or key (JSON) that holds the story."""
    max_stories: int | None = None
    """Number of stories to score, from the start of the split; null for all."""
    batch_size: int = 32
    """Windows per forward pass; changes speed and memory, not the scores."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        return require_at_least(self, "evaluation", max_stories=1, batch_size=1)


@dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """Train a model for each combination of options, and write their table, plots and power law.

    The first group of options is usually in a file (`configs/sweeps/`), the second on the command line. Run
    the same command again to do what is missing.
    """

    output_dir: Path = Path("runs/sweep")
    """Folder of the run directories, the logs and the table."""
    base: list[str] | str = field(default_factory=list)
    """Configuration files that every run starts from, as `--config` of `train`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of every run that replace those of the files, such as `train.max_steps: 400`."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Axes of the grid: an option with its values (`model.hidden_size: [64, 128]`), or a name with the
    options of each of its labels (`width: {64: {model.hidden_size: 64, model.num_attention_heads: 1}}`)."""
    variants: dict[str, Any] = field(default_factory=dict)
    """Named sets of options, each of which is combined with every point of the grid."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Values of `train.seed`; every combination is trained with each."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """Labels of the runs that others are compared with, at equal seeds and otherwise equal labels:
    `{variant: base}`, `{hidden_size: 128}`."""
    concurrent_baseline: bool = False
    """Train the baseline of each run again at the same time. For runs that end by the clock: both then have
    the same load of the machine. Needs `jobs` or `cores` for two."""
    metrics: list[str] = field(default_factory=lambda: ["bits_per_byte", "loss"])
    """Columns of the table, of `evaluate` or, with `report_card`, of the report card (`judge_grammar`). The
    first is drawn and fitted."""
    evaluation: SweepEvaluationArgs = field(default_factory=SweepEvaluationArgs)
    report_card: bool | dict[str, Any] = False
    """Write a report card of each model; true, or options of `report_card` such as `num_stories: 100`."""

    only: list[str] = field(default_factory=list)
    """Labels of the combinations to run; null for all. The table shows these alone."""
    jobs: int = 1
    """Runs at the same time."""
    cores: list[int] = field(default_factory=list)
    """Cores on which runs are held, with one thread each; then as many runs at a time as cores. A core that
    is repeated has several runs."""
    index: int | None = None
    """Do only what is missing of the run with this number, as `list` counts them: a task of an array job."""
    prepare: bool = False
    """Only prepare the data of all runs."""
    estimate: bool = False
    """Only time some steps of each run, and print how long the sweep would take on this machine."""
    table: bool = False
    """Only write the table and plots, from the runs that are finished."""
    list: bool = False
    """Only print the runs, their options and their state."""

    def __post_init__(self) -> None:
        expand_home(self)
        problems = self.evaluation.problems()
        for name, minimum in (("jobs", 1), ("index", 0), ("cores", 0)):
            value = getattr(self, name)
            if value is not None and any(one < minimum for one in (value if name == "cores" else [value])):
                problems.append(f"{name} ({value}) must be at least {minimum}")
        for name in ("seeds", "metrics"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                problems.append(f"{name} ({values}): must hold different values; correct it")
        if self.output_dir == Path("."):
            problems.append("output_dir (.): must name a folder for this sweep alone; try runs/sweep")
        chosen = [name for name in ("prepare", "estimate", "table", "list") if getattr(self, name)]
        if len(chosen) > 1 or (chosen and self.index is not None):
            names = " and ".join([*chosen, *["index"] * (self.index is not None)])
            problems.append(f"{names} cannot be combined; use one of them")
        if not self.bases:
            problems.append("base ([]): must name a configuration; set it, as to configs/debug.yaml")
        if self.concurrent_baseline and not self.baseline:
            problems.append("concurrent_baseline (True) has no effect without baseline; set it")
        if self.concurrent_baseline and self.num_slots < 2:
            problems.append(
                "concurrent_baseline (True): needs two runs at a time; set --jobs 2 or --cores 0 1"
            )
        if problems:
            raise UserError("; ".join(problems))

    @property
    def bases(self) -> tuple[str, ...]:
        """Configuration files, in order."""
        return (self.base,) if isinstance(self.base, str) else tuple(self.base)

    @property
    def num_slots(self) -> int:
        """Number of runs at the same time."""
        return len(self.cores) or self.jobs
