"""Configuration of a run: YAML -> typed, frozen dataclasses -> flags."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tinystories_slm.config.parse import parse
from tinystories_slm.config.sections import DataArgs, ModelArgs, TokenizerArgs, TrainArgs, expand_home
from tinystories_slm.errors import UserError

if TYPE_CHECKING:
    from tinystories_slm.model import TinyStoriesConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of a run, from stories to a trained model in `output_dir`."""

    output_dir: Path = Path("runs/default")
    """Run directory: config.yaml, metrics.jsonl, best/, last/, checkpoints/, loss.png, samples.md."""
    data: DataArgs = field(default_factory=DataArgs)
    tokenizer: TokenizerArgs = field(default_factory=TokenizerArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    train: TrainArgs = field(default_factory=TrainArgs)

    def __post_init__(self) -> None:
        expand_home(self)
        problems = [
            *_output_problems(self),
            *self.data.problems(),
            *self.tokenizer.problems(),
            *_cross_section_problems(self),
            *_architecture_problems(self),
            *self.train.problems(),
        ]
        problems += _non_finite_problems(self, reported=" ".join(problems))
        if problems:
            raise UserError("; ".join(problems))

    def model_config(
        self, *, vocab_size: int, eos_token_id: int = 0, pad_token_id: int | None = None
    ) -> "TinyStoriesConfig":
        """Return the architecture for a vocabulary of `vocab_size` entries and windows of `data.seq_len`.

        `pad_token_id` is by default `eos_token_id`.
        """
        # Imported here: `--help` prints the options without torch.
        from tinystories_slm.model import TinyStoriesConfig

        architecture = asdict(self.model)
        del architecture["init_from"]
        return TinyStoriesConfig(
            **architecture,
            vocab_size=vocab_size,
            max_position_embeddings=self.data.seq_len,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id if pad_token_id is None else pad_token_id,
        )


def parse_config(argv: list[str] | None = None) -> RunConfig:
    """Return the defaults, then each `--config` file left to right, then flags; see `config.parse`."""
    return parse(RunConfig, argv)


def replace_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Return `config` with the values of `options`, by names such as `train.lr`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, _, option = name.rpartition(".")
        sections.setdefault(section, {})[option] = value
    changed = sections.pop("", {})
    changed |= {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(config, **changed)


def run_config_of(args: RunConfig) -> RunConfig:
    """Return the configuration of the run without the other options of a command."""
    return RunConfig(**{field.name: getattr(args, field.name) for field in fields(RunConfig)})


def load_config(path: Path) -> RunConfig:
    """Return the configuration that `save_config` wrote to `path`."""
    return parse_config(["--config", str(path)])


def save_config(config: RunConfig, path: Path) -> None:
    """Write every value of `config` as YAML that `load_config` reads back equal."""
    path.write_text(yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False), encoding="utf-8")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return `config` as nested dictionaries of YAML types."""
    plain = asdict(config)
    plain["output_dir"] = str(config.output_dir)
    plain["data"]["data_dir"] = str(config.data.data_dir)
    return plain


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with keys such as `train.lr`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings which some YAML reader takes for a number: a commit may begin with `5e8`."""


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "'" if text[:1].isdigit() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)


def _output_problems(config: RunConfig) -> list[str]:
    if config.output_dir == Path("."):
        return ["output_dir (.): must name a folder for this run alone; try runs/mine"]
    return []


def _non_finite_problems(config: RunConfig, reported: str) -> list[str]:
    """Return one sentence for each infinite or undefined value that no other problem names."""
    return [
        f"{name} ({value}) must be a finite number; write it as in 0.5"
        for name, value in flatten(to_dict(config)).items()
        if isinstance(value, float)
        and not math.isfinite(value)
        and f"{name.rpartition('.')[2]} (" not in reported
    ]


def _cross_section_problems(config: RunConfig) -> list[str]:
    data, tokenizer = config.data, config.tokenizer
    if tokenizer.pretrained is None and data.token_dtype == "uint16" and tokenizer.vocab_size > 2**16:
        return [
            f"tokenizer.vocab_size ({tokenizer.vocab_size}) does not fit data.token_dtype (uint16, "
            "65536 ids); use uint32 or auto, or a smaller vocabulary"
        ]
    return []


def _architecture_problems(config: RunConfig) -> list[str]:
    if config.data.seq_len < 2 or config.tokenizer.vocab_size < 1:
        return []  # reported by the sections
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.model_config(vocab_size=config.tokenizer.vocab_size)
    except (StrictDataclassError, ValueError) as error:
        # huggingface_hub wraps the sentence of `validate_architecture` in the names of its own classes.
        return [f"model: {error.__cause__ or error}"]
    return []
