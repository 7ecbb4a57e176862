"""Every knob of a run: YAML -> typed, frozen dataclasses -> flags."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.errors import StrictDataclassError

from tinystories_slm.cli import parse
from tinystories_slm.errors import InputError
from tinystories_slm.model import TinyStoriesConfig


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Which stories, and where their files go."""

    source: str = "builtin"
    """`builtin`, a Hub dataset id, or a local file or folder (parquet, JSONL, text)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null for its newest commit, which is recorded."""
    text_column: str = "text"
    """Column (parquet) or key (JSONL) that holds the story."""
    data_dir: Path = Path("data/builtin")
    """Folder of raw stories, tokenizer, token files and manifest; one source per folder."""
    seq_len: int = 256
    """Tokens in a training window."""
    windows: Literal["stream", "story"] = "stream"
    """`stream`: windows tile the token stream; `story`: each opens with a story (a story past `seq_len`
    opens several) and, seven times in eight, the end-of-text token before it."""
    max_stories: int | None = None
    """First training stories taken, before a validation cut; null for all (`builtin`: 40,000)."""
    validation: Literal["auto", "cut"] = "auto"
    """`auto`: the source's own validation split, or a cut where it has none; `cut`: always a cut."""
    validation_fraction: float = 0.05
    """Share of the training stories that a cut takes, chosen by a hash of each story's text."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Type of a token id on disk; `auto` takes uint16 wherever the vocabulary fits it."""
    num_workers: int | None = None
    """Processes that tokenize, at most; null for one per core; small corpora use one."""


@dataclass(frozen=True, kw_only=True)
class TokenizerArgs:
    """The vocabulary: an own byte-level BPE, or an existing tokenizer."""

    vocab_size: int = 10_000
    """Entries of the own BPE, `<|endoftext|>` and the 256 bytes included."""
    pretrained: str | None = None
    """Hub id or folder of an existing tokenizer (`gpt2`) to use instead of an own one."""
    max_stories: int = 200_000
    """Training stories, evenly spaced, that the own BPE is trained on."""


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The architecture; names and meaning are those of `TinyStoriesConfig`."""

    family: Literal["gpt", "modern"] = "gpt"
    """`gpt`: learned positions, LayerNorm, GELU; `modern`: rotary positions, RMSNorm, SwiGLU."""
    num_hidden_layers: int = 8
    """Transformer blocks."""
    hidden_size: int = 256
    """Width of the residual stream; a multiple of `num_attention_heads`."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads (`modern` only); null for as many as query heads."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer; null for 4 x hidden (`gpt`) or 8/3 x hidden (`modern`)."""
    hidden_act: str | None = None
    """Activation of the feed-forward layer, by transformers' name; null for gelu_pytorch_tanh (`gpt`) or
    silu (`modern`, where relu2 is another that works)."""
    bias: bool = False
    """Biases in the linear layers (and, in `gpt`, in LayerNorm)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys (`modern` only)."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""
    tie_word_embeddings: bool = True
    """One matrix for the input embedding and the output head."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles (`modern` only)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    zero_init_residual: bool = False
    """Begin with zeros in the matrices that write to the residual stream: each block is then the identity."""
    init_from: str | None = None
    """Model folder or Hub id whose weights a new run begins with; null for random ones."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """How the weights are optimized; every count is in optimizer steps."""

    max_steps: int = 2_000
    """Optimizer steps of the whole run."""
    max_minutes: float | None = None
    """Minutes of the whole run, everything included; the learning rate then decays by the clock, if that
    is ahead of the steps. Null for no limit."""
    batch_size: int = 64
    """Sequences per optimizer step, over all processes."""
    per_device_batch_size: int | None = None
    """Sequences one process forwards at once; gradient accumulation follows from it. Null for as many as
    suit the device: some 1,000 tokens on a CPU, 32,000 elsewhere."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon on the blocks' matrices and AdamW on all else, at one learning rate."""
    ns_steps: int = 5
    """Newton-Schulz steps by which Muon orthogonalizes an update."""
    momentum: float = 0.95
    """Muon's decay of the gradient's running mean."""
    embedding_lr_rate: float = 1.0
    """Learning rate of the token embedding (with tied embeddings the head's too) as a multiple of `lr`."""
    lr: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    lr_scaling: bool = False
    """Take `lr` for that of a model 256 wide and 4,096 tokens a step, and scale it to this run's own; the
    first lines of a run say to what."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: `cosine`: half a cosine; `wsd` (warm-up, stable, decay): the peak, and a straight
    line down at the end."""
    decay_fraction: float = 0.2
    """Share of the steps after the warm-up, or of their time, over which `wsd` decays; 1 for all of them."""
    min_lr_rate: float = 0.1
    """Final learning rate as a share of the peak, reached at the last step."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's running mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's running square."""
    ema_decay: float | None = None
    """Decay of a running average of the weights, such as 0.99, which is then what is evaluated and what
    best/ and last/ hold; null for none. Checkpoints hold the weights themselves as well."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_in_a_row: int = 20
    """The run ends after so many steps in a row without a finite loss and gradient; each is skipped."""
    eval_every: int = 200
    """Optimizer steps between evaluations; the last step is always evaluated."""
    eval_stories: int | None = None
    """Validation stories scored each time, the first ones; null for all."""
    save_every: int = 200
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    tracker: Literal["none", "trackio", "tensorboard", "wandb"] = "none"
    """Where the lines of metrics.jsonl go as well, through Accelerate; files go under `output_dir`."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Type of the matrix products; `auto` is bf16 where the hardware multiplies it faster, else `no`."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the transformer blocks with torch.compile; `auto` does so on CUDA."""
    attention: Literal["auto", "matmul", "sdpa", "eager", "flex_attention"] = "auto"
    """Back-end of attention; `auto` is `matmul`, plain matrix products, for up to 1,024 tokens on a CPU,
    else `sdpa`, torch's fused kernels."""
    kernels: Literal["auto", "fused", "torch"] = "auto"
    """What computes all but the matrix products: `torch`, or `fused`, kernels of our own for a CPU; `auto` is
    `fused` where these can do the model, attention is `matmul` and blocks are not compiled."""
    resume: str = "auto"
    """`auto` goes on from the newest checkpoint of this run folder; `never` starts over; the path of a
    checkpoint of another run folder branches off from it."""
    seed: int = 0
    """Of the initial weights, the data order and dropout."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: stories to tokens to a trained model in `output_dir`."""

    output_dir: Path = Path("runs/default")
    """Run folder: config.yaml, metrics.jsonl, best/, last/, checkpoints/, loss.png, samples.md."""
    data: DataArgs = field(default_factory=DataArgs)
    tokenizer: TokenizerArgs = field(default_factory=TokenizerArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    train: TrainArgs = field(default_factory=TrainArgs)

    def __post_init__(self) -> None:
        problems = [*_data_problems(self), *_model_problems(self), *_train_problems(self.train)]
        if problems:
            raise InputError("; ".join(problems))

    def model_config(self, *, vocab_size: int, eos_token_id: int = 0) -> TinyStoriesConfig:
        """The architecture for a vocabulary of `vocab_size` entries and windows of `data.seq_len`."""
        architecture = asdict(self.model)
        del architecture["init_from"]
        return TinyStoriesConfig(
            **architecture,
            vocab_size=vocab_size,
            max_position_embeddings=self.data.seq_len,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )


def parse_config(argv: list[str] | None = None) -> RunConfig:
    """Defaults, then each `--config` file left to right, then flags; see `cli.parse`."""
    return parse(RunConfig, argv)


def load_config(path: Path) -> RunConfig:
    """The configuration that `save_config` wrote to `path`."""
    return parse_config(["--config", str(path)])


def save_config(config: RunConfig, path: Path) -> None:
    """Write every value of `config` as YAML that `load_config` reads back equal."""
    path.write_text(yaml.dump(as_plain(config), Dumper=_Dumper, sort_keys=False), encoding="utf-8")


def as_plain(config: RunConfig) -> dict[str, Any]:
    """`config` as nested dictionaries of YAML's own types."""
    plain = asdict(config)
    plain["output_dir"] = str(config.output_dir)
    plain["data"]["data_dir"] = str(config.data.data_dir)
    return plain


class _Dumper(yaml.SafeDumper):
    """Quotes every string that some YAML reader takes for a number: a commit may begin with `5e8`."""


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "'" if text[:1].isdigit() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)


def _data_problems(config: RunConfig) -> list[str]:
    data, tokenizer = config.data, config.tokenizer
    problems = _below(data, "data", seq_len=2, max_stories=1, num_workers=1)
    problems += _below(tokenizer, "tokenizer", max_stories=1)
    if not 0.0 < data.validation_fraction < 1.0:
        problems.append(
            f"data.validation_fraction ({data.validation_fraction}) must lie between 0 and 1; try 0.05"
        )
    if tokenizer.pretrained is None:
        if not 257 <= tokenizer.vocab_size <= 2**20:
            problems.append(
                f"tokenizer.vocab_size ({tokenizer.vocab_size}) must be at least 257 (256 bytes and "
                "<|endoftext|>) and at most 1048576"
            )
        if data.token_dtype == "uint16" and tokenizer.vocab_size > 2**16:
            problems.append(
                f"tokenizer.vocab_size ({tokenizer.vocab_size}) does not fit data.token_dtype (uint16, "
                "65536 ids); use uint32 or auto, or a smaller vocabulary"
            )
    return problems


def _model_problems(config: RunConfig) -> list[str]:
    if config.data.seq_len < 2 or config.tokenizer.vocab_size < 1:
        return []  # told by `_data_problems`
    try:
        config.model_config(vocab_size=config.tokenizer.vocab_size)
    except (StrictDataclassError, ValueError) as error:
        # huggingface_hub wraps the sentence of `validate_architecture` in the names of its own classes.
        return [f"model: {error.__cause__ or error}"]
    return []


def _train_problems(train: TrainArgs) -> list[str]:
    problems = _below(
        train,
        "train",
        max_steps=1,
        batch_size=1,
        per_device_batch_size=1,
        warmup_steps=0,
        eval_every=1,
        eval_stories=1,
        save_every=1,
        keep_checkpoints=1,
        log_every=1,
        max_skipped_in_a_row=1,
        weight_decay=0,
        ns_steps=1,
        seed=0,
    )
    if train.seed >= 2**32:
        problems.append(f"train.seed ({train.seed}) must be below 4294967296")
    if not 0 < train.lr < float("inf"):
        problems.append(f"train.lr ({train.lr}) must be above 0; try 1e-3")
    if not 0 < train.embedding_lr_rate < float("inf"):
        problems.append(f"train.embedding_lr_rate ({train.embedding_lr_rate}) must be above 0; try 1")
    if not 0.0 <= train.min_lr_rate <= 1.0:
        problems.append(
            f"train.min_lr_rate ({train.min_lr_rate}) must lie between 0 and 1: the final learning rate "
            "is this share of train.lr, never above the peak"
        )
    if not 0.0 < train.decay_fraction <= 1.0:
        problems.append(
            f"train.decay_fraction ({train.decay_fraction}) must be above 0 and at most 1; try 0.2"
        )
    if train.resume not in ("auto", "never") and not re.fullmatch(r"step_\d+", Path(train.resume).name):
        problems.append(
            f"train.resume ({train.resume}) must be auto, never, or a checkpoint such as "
            "runs/9m/checkpoints/step_002000"
        )
    if train.max_minutes is not None and not 0 < train.max_minutes < float("inf"):
        problems.append(f"train.max_minutes ({train.max_minutes}) must be above 0, or null for no limit")
    if train.warmup_steps >= train.max_steps:
        problems.append(
            f"train.warmup_steps ({train.warmup_steps}) must be below train.max_steps ({train.max_steps}); "
            "shorten the warm-up or lengthen the run"
        )
    per_device_batch_size = train.per_device_batch_size or 1
    if per_device_batch_size >= 1 and train.batch_size % per_device_batch_size:
        problems.append(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.per_device_batch_size "
            f"({train.per_device_batch_size}); change either"
        )
    if not train.max_grad_norm > 0:
        problems.append(f"train.max_grad_norm ({train.max_grad_norm}) must be above 0; try 1.0")
    if train.ema_decay is not None and not 0.0 < train.ema_decay < 1.0:
        problems.append(
            f"train.ema_decay ({train.ema_decay}) must lie between 0 and 1, or be null for none; try 0.99"
        )
    for name in ("beta1", "beta2", "momentum"):
        if not 0.0 <= getattr(train, name) < 1.0:
            problems.append(f"train.{name} ({getattr(train, name)}) must lie in [0, 1)")
    return problems


def _below(section: object, prefix: str, **minima: int) -> list[str]:
    """A complaint for each field of `section` that is below its minimum (null is always allowed)."""
    return [
        f"{prefix}.{name} ({value}) must be at least {minimum}"
        for name, minimum in minima.items()
        if (value := getattr(section, name)) is not None and value < minimum
    ]
