"""Sections of a run's configuration. Every option is typed and has a unit; each section validates itself."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tinystories_slm.config.canaries import format_canaries, parse_canaries
from tinystories_slm.config.exclusion import parse_exclusion
from tinystories_slm.config.mixture import canonical_source
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import expand_user

MAY_CHANGE_ON_RESUME = {
    "output_dir",
    "data.data_dir",
    "data.num_workers",
    "train.resume",
    "train.log_every",
    "train.tracker",
    "train.eval_every",
    "train.eval_stories",
    "train.eval_tasks",
    "train.save_every",
    "train.keep",
    "train.sharded_checkpoints",
    "train.on_hangup",
    "train.per_device_batch_size",
    "train.compile",
    "train.attention",
    "train.cpu_kernels",
    "train.timeout_s",
}
"""Options that may differ between the two parts of a resumed run: they change where it is, how it is observed
and how its steps are computed, not what is learned."""

MAY_CHANGE_ON_EXTENSION = {"train.max_steps", "train.max_minutes", "train.rewarm_lr_rate"}
"""Options that may differ, too, where `train.resume: extend` trains a finished run on."""

RESUME_MODES = ("auto", "never", "extend")
"""Values of `train.resume` that are no path."""


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Source of the stories, their split, packing and files."""

    source: str | list[dict[str, Any]] = "builtin"
    """`builtin`, `builtin-instruct`, a named set (`download_data --list`), a Hub dataset id, or a local file
    or folder (parquet, CSV, JSON, text); or a list of these with weights: `[{name: tinystories, weight: 3},
    {name: a.csv}]`."""
    subset: str | None = None
    """Configuration of a Hub dataset, or of a folder whose README.md lists several; null for the default."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null for its newest commit, which is recorded, or the pinned
    commit of a named set."""
    text_column: str = "text"
    """Column (parquet, CSV) or key (JSON) that holds the story."""
    data_dir: Path = Path("data/builtin")
    """Folder of raw stories, tokenizer, token files and manifest; one source per folder."""
    seq_len: int = 256
    """Tokens in a training window."""
    packing: str = "contiguous"
    """`contiguous`: windows tile the token stream; `document`: each opens with a story (a story past
    `seq_len` opens several) and, seven times in eight, the end-of-text token before it; `best_fit`: whole
    stories share windows, which are padded."""
    mask_across_stories: bool = False
    """Whether a token attends only to its own story, and positions restart with each story."""
    loss_on: Literal["all", "story"] = "all"
    """`story`: the lines before the story of a block (docs/instruct.md) are context, and not trained on."""
    max_stories: int | None = None
    """Number of training stories, the first ones, before a validation split is cut; null for all (`builtin`:
    40,000)."""
    validation_split: Literal["auto", "holdout"] = "auto"
    """`auto`: the source's validation split, or stories held out of training if it has none; `holdout`:
    always held out."""
    validation_fraction: float = 0.05
    """Share of the training stories that is held out, chosen by a hash of each story's text."""
    cleaning: bool | None = None
    """Repair stories, and drop faulty ones, by the rules of docs/data.md; null: for named sets."""
    deduplicate: bool | None = None
    """Drop near duplicates within training, and training stories that repeat validation stories; null: for
    named sets."""
    canaries: str | list[dict[str, Any]] | None = None
    """Texts that are planted among the training stories, as a list: `[{text: 'The code is {digit}{digit}.',
    count: 10}]`. A slot (`{digit}`, `{red|green}`) is filled at random; see docs/inspect.md."""
    exclude: list[str] | str = field(default_factory=list)
    """Training stories that the run does not read; all else stays in its place. Rules: `story:12`,
    `story:100-199` (rows of raw/train.parquet), `cluster:12` (with its near duplicates), `pattern:REGEX`."""
    streaming: bool = False
    """Read the training stories from the source while the run trains, for corpora larger than the disk; the
    tokenizer and the validation stories are of the first stories."""
    streaming_chunk_tokens: int = 2**22
    """Tokens that `streaming` reads at once; windows are shuffled within such a chunk."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Type of a token id on disk; `auto` takes uint16 wherever the vocabulary fits it."""
    num_workers: int | None = None
    """Processes that tokenize, at most; null for one per core; small corpora use one."""

    def __post_init__(self) -> None:
        expand_home(self)
        try:
            object.__setattr__(self, "source", canonical_source(self.source))
        except ValueError as error:
            raise UserError(f"data.source ({self.source}): {error}") from error
        try:
            object.__setattr__(self, "canaries", format_canaries(parse_canaries(self.canaries)))
        except ValueError as error:
            raise UserError(f"data.canaries ({self.canaries}): {error}") from error
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", [self.exclude] if self.exclude else [])

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        found = require_at_least(
            self, "data", seq_len=2, max_stories=1, num_workers=1, streaming_chunk_tokens=1
        )
        try:
            parse_exclusion(self.exclude)
        except ValueError as error:
            found.append(f"data.exclude: {error}")
        if self.streaming:
            found += self._streaming_problems()
        if not 0.0 < self.validation_fraction < 1.0:
            found.append(
                f"data.validation_fraction ({self.validation_fraction}) must lie between 0 and 1; try 0.05"
            )
        return found

    def _streaming_problems(self) -> list[str]:
        """Return one sentence for each option that needs all stories before training."""
        found = []
        if self.deduplicate:
            found.append(
                "data.deduplicate (true): compares all stories, and data.streaming holds few of them; set "
                "either to false"
            )
        for name in ("canaries", "exclude"):
            if value := getattr(self, name):
                found.append(
                    f"data.{name} ({value}): needs all stories, and data.streaming holds few of them; "
                    "remove either"
                )
        return found


@dataclass(frozen=True, kw_only=True)
class TokenizerArgs:
    """Vocabulary: a byte-level BPE trained on the stories, or an existing tokenizer."""

    vocab_size: int = 10_000
    """Entries of the trained BPE, including `<|endoftext|>`, the 256 bytes and (from 258 on) `<|pad|>`."""
    pretrained: str | None = None
    """Hub id or folder of an existing tokenizer (`gpt2`) to use instead of training one."""
    max_stories: int = 200_000
    """Training stories, evenly spaced, that the BPE is trained on."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        found = require_at_least(self, "tokenizer", max_stories=1)
        if self.pretrained is None and not 257 <= self.vocab_size <= 2**20:
            found.append(
                f"tokenizer.vocab_size ({self.vocab_size}) must be at least 257 (256 bytes and "
                "<|endoftext|>) and at most 1048576"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Architecture; names and meaning are those of `TinyStoriesConfig`."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """`gpt2`: learned positions, LayerNorm, GELU; `llama`: rotary positions, RMSNorm, SwiGLU."""
    num_hidden_layers: int = 8
    """Transformer blocks."""
    hidden_size: int = 256
    """Width of the residual stream; a multiple of `num_attention_heads`."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads (`llama` only); null for as many as query heads."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer; null for 4 x hidden (`gpt2`) or 8/3 x hidden (`llama`)."""
    hidden_act: str | None = None
    """Activation of the feed-forward layer, by transformers' name; null for gelu_pytorch_tanh (`gpt2`) or
    silu (`llama`; relu2 works too)."""
    bias: bool = False
    """Biases in the linear layers (and, in `gpt2`, in LayerNorm)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys (`llama` only)."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""
    tie_word_embeddings: bool = True
    """One matrix for the input embedding and the output head."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles (`llama` only)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    zero_init_residual: bool = False
    """Initialize the matrices that write to the residual stream with zeros: each block starts as the
    identity."""
    init_from: str | None = None
    """Model folder or Hub id whose weights a new run starts from; null for random weights."""


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """Optimizer, its rates and decays."""

    optimizer: str = "adamw"
    """`adamw`; or `muon`: Muon on the blocks' matrices and AdamW on all else, at one learning rate."""
    muon_ns_steps: int = 5
    """Newton-Schulz steps by which Muon orthogonalizes an update."""
    muon_momentum: float = 0.95
    """Muon's decay of the gradient's running mean."""
    embedding_lr_multiplier: float = 1.0
    """Learning rate of the token embedding (and of a tied head) as a multiple of `lr`."""
    lr: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    lr_scaling: bool = False
    """Interpret `lr` as the rate of a model 256 wide at 4,096 tokens a step, and scale it to this run; the
    log prints the scaled rate at the start."""
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
    max_consecutive_skipped_steps: int = 20
    """Consecutive steps without a finite loss and gradient after which the run ends; each is skipped."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        found = require_at_least(
            self, "train", max_consecutive_skipped_steps=1, weight_decay=0, muon_ns_steps=1
        )
        if not 0 < self.lr < float("inf"):
            found.append(f"train.lr ({self.lr}) must be above 0; try 1e-3")
        if not 0 < self.embedding_lr_multiplier < float("inf"):
            found.append(
                f"train.embedding_lr_multiplier ({self.embedding_lr_multiplier}) must be above 0; try 1"
            )
        if not self.max_grad_norm > 0:
            found.append(f"train.max_grad_norm ({self.max_grad_norm}) must be above 0; try 1.0")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            found.append(
                f"train.ema_decay ({self.ema_decay}) must lie between 0 and 1, or be null for none; try 0.99"
            )
        found += [
            f"train.{name} ({getattr(self, name)}) must lie in [0, 1)"
            for name in ("beta1", "beta2", "muon_momentum")
            if not 0.0 <= getattr(self, name) < 1.0
        ]
        return found


@dataclass(frozen=True, kw_only=True)
class ScheduleArgs:
    """Length of the run and learning rate over it; every count is in optimizer steps."""

    max_steps: int = 2_000
    """Optimizer steps of the whole run."""
    max_minutes: float | None = None
    """Minutes of the whole run, everything included; the learning rate then decays by the clock, if that
    is ahead of the steps. Null for no limit."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: `cosine`: half a cosine; `wsd` (warm-up, stable, decay): the peak, and a straight
    line down at the end."""
    decay_fraction: float = 0.2
    """Share of the steps after the warm-up, or of their time, over which `wsd` decays; 1 for all of them."""
    min_lr_rate: float = 0.1
    """Final learning rate as a share of the peak, reached at the last step."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    rewarm_lr_rate: float = 0.5
    """Share of the peak to which a run without a constant part warms up again where it is extended
    (`resume: extend`)."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        found = require_at_least(self, "train", max_steps=1, warmup_steps=0)
        if not 0.0 <= self.min_lr_rate <= 1.0:
            found.append(
                f"train.min_lr_rate ({self.min_lr_rate}) must lie between 0 and 1: the final learning rate "
                "is this share of train.lr, never above the peak"
            )
        if not 0.0 < self.rewarm_lr_rate <= 1.0:
            found.append(
                f"train.rewarm_lr_rate ({self.rewarm_lr_rate}) must be above 0 and at most 1; try 0.5"
            )
        if not 0.0 < self.decay_fraction <= 1.0:
            found.append(
                f"train.decay_fraction ({self.decay_fraction}) must be above 0 and at most 1; try 0.2"
            )
        if self.max_minutes is not None and not 0 < self.max_minutes < float("inf"):
            found.append(f"train.max_minutes ({self.max_minutes}) must be above 0, or null for no limit")
        if self.warmup_steps >= self.max_steps:
            found.append(
                f"train.warmup_steps ({self.warmup_steps}) must be below train.max_steps ({self.max_steps}); "
                "shorten the warm-up or lengthen the run"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class BatchArgs:
    """Sequences of an optimizer step and of a forward pass."""

    batch_size: int = 64
    """Sequences per optimizer step, over all processes."""
    per_device_batch_size: int | None = None
    """Sequences of one forward pass (micro-batch) of a process; gradient accumulation follows from it. Null
    for a size that suits the device: some 1,000 tokens on a CPU, 32,000 elsewhere."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        found = require_at_least(self, "train", batch_size=1, per_device_batch_size=1)
        per_device_batch_size = self.per_device_batch_size or 1
        if per_device_batch_size >= 1 and self.batch_size % per_device_batch_size:
            found.append(
                f"train.batch_size ({self.batch_size}) must be a multiple of train.per_device_batch_size "
                f"({self.per_device_batch_size}); change either"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class RuntimeArgs:
    """Computation of a step: precision, compilation, attention, kernels."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the matrix products; `auto` is bf16 where the hardware computes it faster, else `no`."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the transformer blocks with torch.compile; `auto` does so on CUDA."""
    attention: Literal["auto", "matmul", "sdpa", "eager", "flex_attention"] = "auto"
    """Attention backend; `auto` is `matmul` (plain matrix products) for up to 1,024 tokens on a CPU, else
    `sdpa` (torch's fused kernels)."""
    cpu_kernels: Literal["auto", "fused", "torch"] = "auto"
    """Implementation of everything but the matrix products on a CPU: `torch`, or `fused`, this project's C
    kernels; `auto` is `fused` if they support the model, attention is `matmul` and blocks are not
    compiled."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which several processes sum their gradients; `bfloat16` halves the bytes of the sum, and
    rounds each gradient before it (docs/communication.md)."""
    timeout_s: float = 90.0
    """Seconds without progress of any process after which a launch of several processes ends and names the
    process that holds it up. Evaluation, saving and waiting for a stream do not count."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        return require_at_least(self, "train", timeout_s=1)


@dataclass(frozen=True, kw_only=True)
class CheckpointArgs:
    """When checkpoints are written, kept and resumed."""

    save_every: int = 200
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: str = "newest:2"
    """Steps that stay, as rules with commas between them. `newest:N`: the newest N checkpoints, which resume
    the run (2 if not named). Each of the other rules keeps model folders such as steps/step_000512:
    `every:N`; `log`: steps 0, 1, 2, 4, 8, ...; `all`: whenever a checkpoint is saved; `512`: that step.
    `log:full` keeps the checkpoints of these steps too, to branch from."""
    sharded_checkpoints: bool = False
    """Each process of a model that FSDP2 shards writes its own part of a checkpoint, while the run goes on;
    last/ is then written first and at the end. Without FSDP2 it has no effect."""
    resume: str = "auto"
    """`auto` resumes from the newest checkpoint of this run directory; `never` starts over; `extend` trains
    a finished run on, to a larger `max_steps` or `max_minutes` (docs/longer.md); the path of a
    checkpoint of another run directory branches off from it."""
    on_hangup: Literal["continue", "stop"] = "continue"
    """What a run does after SIGHUP (its terminal was closed) and the checkpoint that follows; with a
    launcher, which SIGHUP ends, a run always stops."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        found = require_at_least(self, "train", save_every=1)
        if self.resume not in RESUME_MODES and not re.fullmatch(r"step_\d+", Path(self.resume).name):
            found.append(
                f"train.resume ({self.resume}) must be auto, never, extend, or a checkpoint such as "
                "runs/9m/checkpoints/step_002000"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class LoggingArgs:
    """When the run is evaluated and logged, and where to."""

    eval_every: int = 200
    """Optimizer steps between evaluations; the last step is always evaluated."""
    eval_stories: int | None = None
    """Validation stories scored at each evaluation, the first ones; null for all."""
    eval_tasks: str | None = None
    """Further measurements at each evaluation, of 16 generated stories, separated by commas: `ended` (share
    that ends before the length limit), `grammar` (share that the grammar of the built-in corpus accepts); or
    of stories for prompts of the validation stories: `instruct` (shares of words and features used)."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    tracker: Literal["none", "trackio", "tensorboard", "wandb"] = "none"
    """Tracker that receives the lines of metrics.jsonl too, through Accelerate; its files go under
    `output_dir`."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value."""
        return require_at_least(self, "train", eval_every=1, eval_stories=1, log_every=1)


@dataclass(frozen=True, kw_only=True)
class TrainArgs(LoggingArgs, CheckpointArgs, RuntimeArgs, OptimizerArgs, BatchArgs, ScheduleArgs):
    """Options of training; every count is in optimizer steps.

    The options of all sections stand in one group, `train`. A module takes the section that it needs.
    """

    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""

    def problems(self) -> list[str]:
        """Return one sentence for each invalid value of all sections."""
        sections = (OptimizerArgs, ScheduleArgs, BatchArgs, RuntimeArgs, CheckpointArgs, LoggingArgs)
        found = [problem for section in sections for problem in section.problems(self)]
        found += require_at_least(self, "train", seed=0)
        if self.sharded_checkpoints and self.mixed_precision == "fp16":
            found.append("train.sharded_checkpoints (True) does not save the loss scale of fp16; use bf16")
        if self.seed >= 2**32:
            found.append(f"train.seed ({self.seed}) must be below 4294967296")
        return found


def require_at_least(section: object, prefix: str, **minima: int) -> list[str]:
    """Return one sentence for each field of `section` below its minimum; null is always allowed."""
    return [
        f"{prefix}.{name} ({value}) must be at least {minimum}"
        for name, minimum in minima.items()
        if (value := getattr(section, name)) is not None and not value >= minimum
    ]


def expand_home(section: Any) -> None:
    """Replace a leading `~` in every path of a frozen dataclass: a shell expands it in few places."""
    for item in fields(section):
        if isinstance(value := getattr(section, item.name), Path):
            object.__setattr__(section, item.name, expand_user(value))
