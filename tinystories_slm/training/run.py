"""A run: model, optimizers, data and records, built from the configuration or from a checkpoint."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from tinystories_slm.config import RunConfig, save_config
from tinystories_slm.data import builtin
from tinystories_slm.data.origin import BUILTIN
from tinystories_slm.data.prepare import Manifest, open_tokens, prepared
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.data.windows import Windows, read_stories
from tinystories_slm.errors import InputError
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.checkpoints import (
    MANIFEST,
    Progress,
    check_same_data,
    check_same_run,
    checkpoints,
    load_checkpoint,
    step_of,
)
from tinystories_slm.training.display import Display, Stopwatch
from tinystories_slm.training.optim import build_optimizers, build_scheduler
from tinystories_slm.training.precision import resolve_precision
from tinystories_slm.training.tracking import RunRecord

logger = logging.getLogger(__name__)

_FOLDERS = ("checkpoints", "best", "last")


@dataclass
class Run:
    """A run at `progress.step`; see `start_run`."""

    config: RunConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    windows: Windows
    validation: list[np.ndarray]
    """Token ids of the validation stories."""
    model: TinyStoriesForCausalLM
    """The model itself: to save, to evaluate, to tell stories."""
    prepared_model: nn.Module
    """The same as Accelerate wrapped it: to train."""
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[LRScheduler]
    """One for each optimizer; all follow the same schedule."""
    progress: Progress
    record: RunRecord
    display: Display
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    unlogged_losses: list[torch.Tensor] = field(default_factory=list)
    """One a step since the last log, still on the device: reading one would wait for it."""

    @property
    def tokens(self) -> int:
        """Training tokens read so far."""
        return self.progress.step * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len

    def due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens now."""
        return self.progress.step % every == 0 or self.progress.step == self.config.train.max_steps


def start_run(config: RunConfig) -> Run:
    """Data, model and optimizer, at the first step or where the newest checkpoint stands.

    Whatever can be wrong is refused before the data are prepared and before anything is overwritten.
    """
    args = config.train
    accelerator = _accelerator(config)
    checkpoint = _checkpoint_to_resume(config)
    _check_run_folder(config.output_dir)
    manifest = _main_process_first(accelerator, lambda: prepared(config.data, config.tokenizer))
    if checkpoint:
        check_same_data(manifest, config.output_dir)
    tokenizer = load_tokenizer(str(config.data.data_dir / "tokenizer"))
    windows = Windows(
        config.data.data_dir / "train.bin",
        token_dtype=manifest.token_dtype,
        seq_len=config.data.seq_len,
        seed=args.seed,
        eos_token_id=manifest.eos_token_id if config.data.windows == "story" else None,
    )
    validation = open_tokens(config.data.data_dir, "validation", manifest)

    set_seed(args.seed)
    model = TinyStoriesForCausalLM(
        config.model_config(vocab_size=manifest.vocab_size, eos_token_id=manifest.eos_token_id)
    )
    if args.compile:
        for layer in model.model.layers:
            layer.compile()  # in place: every name and every saved file stays as it is without
    optimizers = build_optimizers(model, args)
    # Not prepared, so that they count optimizer steps on any number of processes.
    schedulers = [build_scheduler(optimizer, args) for optimizer in optimizers]
    prepared_model, *optimizers = accelerator.prepare(model, *optimizers)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, *schedulers)
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
    elif accelerator.is_main_process:
        _clear(config.output_dir)
        save_config(config, config.output_dir / "config.yaml")
        manifest.save(config.output_dir / MANIFEST)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        _announce(config, accelerator, model, manifest, progress)
    return Run(
        config=config,
        accelerator=accelerator,
        tokenizer=tokenizer,
        windows=windows,
        validation=list(read_stories(validation, manifest.eos_token_id, limit=args.eval_stories)),
        model=model,
        prepared_model=prepared_model,
        optimizers=optimizers,
        schedulers=schedulers,
        progress=progress,
        record=RunRecord(
            config.output_dir,
            step=progress.step,
            entropy=_entropy(manifest),
            written=accelerator.is_main_process,
        ),
        display=Display(args.max_steps, first_step=progress.step, shown=accelerator.is_main_process),
    )


def finished(config: RunConfig) -> bool:
    """Whether the run folder holds this very run, trained to its last step, and it is not to start over.

    Raises:
        InputError: it holds another run.
    """
    found = checkpoints(config.output_dir)
    if not found or config.train.resume == "never":
        return False
    check_same_run(config, config.output_dir)
    return step_of(found[-1]) >= config.train.max_steps


def _accelerator(config: RunConfig) -> Accelerator:
    args, state = config.train, _processes()
    per_forward = args.per_device_batch_size * state.num_processes
    if args.batch_size % per_forward:
        raise InputError(
            f"train.batch_size ({args.batch_size}) must be a multiple of train.per_device_batch_size x "
            f"processes ({args.per_device_batch_size} x {state.num_processes}); change either, or launch "
            "with another --num_processes"
        )
    precision = resolve_precision(args.mixed_precision, state.device)
    if precision == "fp16" and args.optimizer == "muon":
        raise InputError(
            "train.mixed_precision (fp16) scales gradients for one optimizer, and train.optimizer (muon) "
            "makes two; use bf16 or no, or adamw"
        )
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.batch_size // per_forward, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
    )


def _processes() -> PartialState:
    """The processes of this launch.

    Accelerate joins CPU processes only where it is told to use the CPU; left alone, each of them would
    take itself for the only one and all would write to one folder.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # The others wait while the first one downloads and tokenizes.
    state = PartialState(cpu=cpu, timeout=timedelta(hours=12))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise InputError(
            f"the launcher started {launched} processes and Accelerate joined {state.num_processes}; for CPU "
            "processes set ACCELERATE_USE_CPU=1, else see `accelerate env`"
        )
    return state


def _checkpoint_to_resume(config: RunConfig) -> Path | None:
    found = checkpoints(config.output_dir)
    if not found or config.train.resume == "never":
        return None
    check_same_run(config, config.output_dir)
    return found[-1]


def _entropy(manifest: Manifest) -> float | None:
    """Of the built-in corpus, in nats per token of this vocabulary; null for any other source."""
    if manifest.source != BUILTIN:
        return None
    validation = manifest.splits["validation"]
    return builtin.entropy() * validation["num_stories"] / validation["num_tokens"]


def _main_process_first(accelerator: Accelerator, make: Callable[[], Manifest]) -> Manifest:
    """`make()` on the first process, then on the others; what the first is refused, all are.

    Raises:
        InputError: on every process, so that none waits for one that has gone.
    """
    made, refusal = None, None
    if accelerator.is_main_process:
        try:
            made = make()
        except InputError as error:
            refusal = str(error)
    [refusal] = broadcast_object_list([refusal])
    if refusal is not None:
        raise InputError(refusal)
    return made or make()


def _check_run_folder(run_dir: Path) -> None:
    """Refuse a folder that cannot be made or written to, or whose contents are not a run's.

    Raises:
        InputError: nothing was touched.
    """
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"output_dir ({run_dir}) cannot be written to; choose another --output_dir")
    others = [name for name in _FOLDERS if (run_dir / name).exists()]
    if others and not (run_dir / "config.yaml").is_file():
        raise InputError(
            f"output_dir ({run_dir}) holds {', '.join(others)} that no run of this program made (there is no "
            "config.yaml); choose another --output_dir"
        )


def _clear(run_dir: Path) -> None:
    """Drop what a run before this one left, and nothing else."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("metrics.jsonl", "samples.md", "loss.png", "evaluation.json"):
        (run_dir / name).unlink(missing_ok=True)


def _announce(
    config: RunConfig,
    accelerator: Accelerator,
    model: TinyStoriesForCausalLM,
    manifest: Manifest,
    progress: Progress,
) -> None:
    """The arithmetic that a reader would do by hand."""
    args = config.train
    num_parameters = model.num_parameters()
    num_embedding = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    tokens_per_step = args.batch_size * config.data.seq_len
    train_tokens = manifest.splits["train"]["num_tokens"]
    logger.info(
        "model: %s parameters (%s without embeddings), %s family, vocabulary %s",
        f"{num_parameters:,}", f"{num_parameters - num_embedding:,}", model.config.family,
        f"{model.config.vocab_size:,}",
    )  # fmt: skip
    logger.info(
        "run: %d steps of %d x %d = %s tokens, %s in all, %.1f x the %s training tokens",
        args.max_steps, args.batch_size, config.data.seq_len, f"{tokens_per_step:,}",
        f"{args.max_steps * tokens_per_step:,}", args.max_steps * tokens_per_step / train_tokens,
        f"{train_tokens:,}",
    )  # fmt: skip
    logger.info(
        "on: %d process%s, %s, mixed precision %s, %d micro-batch%s a step%s",
        accelerator.num_processes, "" if accelerator.num_processes == 1 else "es", accelerator.device,
        accelerator.mixed_precision, accelerator.gradient_accumulation_steps,
        "" if accelerator.gradient_accumulation_steps == 1 else "es",
        f"; resumed at step {progress.step}" if progress.step else "",
    )  # fmt: skip
