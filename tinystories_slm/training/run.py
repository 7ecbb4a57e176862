"""Training run: model, optimizers, data and recorder, built from the configuration or a checkpoint."""

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from filelock import FileLock
from torch import nn
from transformers import PreTrainedTokenizerBase

from tinystories_slm.config import RunConfig
from tinystories_slm.data.packing import ORDER_VERSION, WindowSource, iter_documents, packing_class
from tinystories_slm.data.prepare import ensure_prepared
from tinystories_slm.data.streaming import open_stream
from tinystories_slm.data.token_files import Manifest, open_prompt_lengths, open_tokens
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.data.training_windows import open_windows
from tinystories_slm.hardware.launch_env import is_launched
from tinystories_slm.hardware.malloc import tune_malloc
from tinystories_slm.hardware.peak import PeakFlops, mfu, peak_flops
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_costs import flops_per_token
from tinystories_slm.runs.console import ProgressDisplay, Stopwatch
from tinystories_slm.runs.recorder import RunRecorder
from tinystories_slm.runs.records import entropy_per_token
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.runs.trackers import Tracker, tracker_options
from tinystories_slm.training.builder import prepare_to_train
from tinystories_slm.training.checkpoint_tensors import TrainedState
from tinystories_slm.training.checkpoints import (
    TrainState,
    check_same_data,
    check_same_run,
    check_same_source,
    checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
    read_progress,
)
from tinystories_slm.training.device_check import check_device
from tinystories_slm.training.distributed import (
    abandon_process_group,
    broadcast_from_main,
    build_accelerator,
    main_process_first,
    prepare,
    set_step_timeout,
)
from tinystories_slm.training.ema import EMA
from tinystories_slm.training.environment import write_environment
from tinystories_slm.training.extension import find_extension
from tinystories_slm.training.initialization import load_initial_weights
from tinystories_slm.training.machine_errors import translate_machine_errors
from tinystories_slm.training.optimizers import optimizer_spec
from tinystories_slm.training.restore import training_data_record
from tinystories_slm.training.retention import KeptSteps
from tinystories_slm.training.run_folder import (
    check_resume,
    lock_run_dir,
    prepare_run_dir,
    release_run_dir,
    run_dir_of,
)
from tinystories_slm.training.run_plan import log_run_plan
from tinystories_slm.training.runtime import RuntimeSettings
from tinystories_slm.training.schedule import is_before_decay, peak_lr
from tinystories_slm.training.sharded_checkpoints import CheckpointWriter
from tinystories_slm.training.sharding import is_sharded, unsharded_copy
from tinystories_slm.training.signals import StopRequest
from tinystories_slm.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """A run at optimizer step `progress.step`; `start_run` builds it."""

    config: RunConfig
    accelerator: Accelerator
    runtime: RuntimeSettings
    """Resolved value of every `auto` in `config`."""
    tokenizer: PreTrainedTokenizerBase
    dataset: WindowSource
    validation: list[np.ndarray]
    """Token ids of the validation stories, one int64 array (story_length,) each."""
    validation_prompts: np.ndarray | None
    """Number of ids before each validation story that are context, (num_stories,); None for none."""
    model: TinyStoriesForCausalLM
    """The model itself: to save, evaluate and generate."""
    prepared_model: nn.Module
    """`model` as wrapped by Accelerate: to train."""
    optimizers: list[torch.optim.Optimizer]
    ema: EMA | None
    """Moving average of the weights; None if `train.ema_decay` is null."""
    progress: TrainState
    recorder: RunRecorder
    display: ProgressDisplay
    peak_flops: PeakFlops
    """Peak FLOP/s of this process's device."""
    writer: CheckpointWriter | None
    """Writes sharded checkpoints in the background; None if checkpoints are whole."""
    lock: FileLock
    """Lock of the run directory, held until `close`."""
    started_s: float
    """Start of this session by `time.perf_counter`, minus the seconds of earlier sessions."""
    stop: StopRequest = field(default_factory=StopRequest)
    stop_agreed: bool = False
    """Whether every process has received that one of them has a stop request."""
    save_agreed: bool = False
    """Whether every process has received that the terminal of one of them closed since the last step."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    watchdog: Watchdog = field(init=False)
    timer_start_step: int = 0
    """Step at the last start of `stopwatch`; steps of an earlier session do not count for the speed."""
    seconds_per_token: float = 0.0
    """Training time per token between the last two log lines; 0 before the first."""
    local_losses: list[torch.Tensor] = field(default_factory=list)
    """Loss of this process for each unlogged step, on the device: reading one would force a sync."""
    pending_finite_flags: list[torch.Tensor] = field(default_factory=list)
    """Per step since the last log or save: whether the gradient was finite, on the device.

    Empty if `checks_grad_on_host`.
    """

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.config.train.timeout_s, lambda: self.stopwatch.is_paused)

    @property
    def state(self) -> TrainedState:
        """The part of the run that a checkpoint holds beside `progress`."""
        return TrainedState(self.accelerator, self.model, self.optimizers, self.ema)

    @property
    def checks_grad_on_host(self) -> bool:
        """Whether to check the gradient norm on the host each step, which forces a device sync.

        Not needed for an optimizer that skips non-finite steps on the device (see
        `loop._should_skip_step`). With FSDP and with the fp16 gradient scaler, other code decides whether
        to skip.
        """
        accelerator = self.accelerator
        return (
            accelerator.device.type == "cpu"
            or not optimizer_spec(self.config.train.optimizer).skips_on_device
            or accelerator.scaler is not None
            or accelerator.distributed_type == DistributedType.FSDP
        )

    @property
    def tokens(self) -> int:
        """Number of training tokens processed so far."""
        return self.progress.step * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step over all processes."""
        return self.config.train.batch_size * self.config.data.seq_len

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        width = self.config.model.hidden_size
        return peak_lr(self.config.train, hidden_size=width, tokens_per_step=self.tokens_per_step)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds over all sessions, up to now."""
        return time.perf_counter() - self.started_s

    @property
    def estimated_final_seconds(self) -> float:
        """Estimated seconds of the final evaluation and save, equal to the last ones.

        Before the first evaluation, one is estimated as a forward pass over the validation tokens: a
        third of the training cost per token.
        """
        evaluation_s = self.progress.evaluation_seconds
        if not evaluation_s:
            evaluation_s = self.seconds_per_token / 3 * sum(map(len, self.validation))
        return evaluation_s + self.progress.saving_seconds

    def mfu(self, tokens_per_second: float) -> float:
        """Return the model-FLOP utilization at this speed; see `hardware.peak.mfu`."""
        per_token = flops_per_token(self.model.config, self.config.data.seq_len)
        num_processes = self.accelerator.num_processes
        return mfu(tokens_per_second, per_token, self.peak_flops, num_processes=num_processes)

    def remeasure_peak(self) -> None:
        """Measure the peak FLOP/s again, keep the higher value and record it in environment.json.

        For a first measurement that another program disturbed.
        """
        new_peak = peak_flops(self.accelerator.device, self.accelerator.mixed_precision)
        self.peak_flops = max(self.peak_flops, new_peak, key=lambda peak: peak.flops_per_second)
        if self.accelerator.is_main_process:
            write_environment(
                self.config.output_dir,
                self.accelerator,
                self.runtime,
                self.peak_flops,
                first_step=self.progress.step + 1,
            )

    def eval_model(self) -> TinyStoriesForCausalLM:
        """Return the model to evaluate and to save to best/ and last/, unsharded.

        It has the EMA of the weights if `train.ema_decay` is set. Every process must call this, because a
        sharded model is gathered. Its configuration names the step, and the decay of the average.
        """
        model = self.ema.averaged_model() if self.ema else unsharded_copy(self.model)
        if self.ema:
            model.config.ema_decay = self.config.train.ema_decay
        model.config.training_step = self.progress.step
        return model

    def is_due(self, every: int) -> bool:
        """Whether an action that runs every `every` steps, and at the end, runs at this step."""
        return self.progress.step % every == 0 or self.progress.finished

    @property
    def is_before_decay(self) -> bool:
        """Whether the next step is one of every longer run."""
        progress = self.progress
        return is_before_decay(self.config.train, progress.step, progress.time_fraction)

    @property
    def should_save(self) -> bool:
        """Whether to save at this step: by interval, by `train.keep`, before the decay, or at a request."""
        requested = self.stop_agreed or self.save_agreed
        step = self.progress.step
        is_kept = self.kept_steps.saves_checkpoint(step) or step == self.progress.decay_step
        return self.is_due(self.config.train.save_every) or is_kept or requested

    @property
    def is_ending(self) -> bool:
        """Whether the session ends after this step."""
        return self.progress.finished or self.stop_agreed

    @property
    def kept_steps(self) -> KeptSteps:
        """The rules of `train.keep`."""
        return KeptSteps.parse(self.config.train.keep)

    @property
    def keeps_step(self) -> bool:
        """Whether the model of this step stays in steps/."""
        step = self.progress.step
        is_saved = step > 0 and self.is_due(self.config.train.save_every)
        return self.kept_steps.keeps_model(step, is_saved=is_saved)

    def close(self) -> None:
        """Close the data, the display and the recorder, and unlock the run directory."""
        self.dataset.close()
        self.display.close()
        self.recorder.close()
        self.lock.release()


class _TrainingData(NamedTuple):
    manifest: Manifest
    tokenizer: PreTrainedTokenizerBase
    dataset: WindowSource
    validation_tokens: np.ndarray
    """Memory map (num_tokens,) of the validation split."""
    validation_prompts: np.ndarray | None
    """Number of ids before each validation story that are context; None for none."""


def start_run(config: RunConfig) -> TrainingRun:
    """Build the data, model and optimizers of a run, new or restored from a checkpoint.

    All checks of the configuration and the run directory run before data preparation and before the
    first write.

    Raises:
        UserError: the configuration, the run directory, the data or the checkpoint is invalid.
    """
    session_start_s = time.perf_counter()
    tune_malloc()
    accelerator, runtime = build_accelerator(config, **tracker_options(config))
    lock = FileLock(RunDir(config.output_dir).lock, blocking=False)
    checkpoint = broadcast_from_main(accelerator, lambda: lock_run_dir(config, lock))
    try:
        return _build_run(config, accelerator, runtime, lock, checkpoint, session_start_s)
    except BaseException:
        if lock.is_locked:
            release_run_dir(config.output_dir, lock)
        abandon_process_group(accelerator)
        raise


def is_finished(config: RunConfig) -> bool:
    """Whether the run directory holds this run, already finished, and `train.resume` keeps it.

    Raises:
        UserError: it holds another run, `train.resume` is an older checkpoint of it or an extension that
            is not possible, or the run is finished and its source has changed.
    """
    RunDir(config.output_dir).check_files()
    check_resume(config)
    if find_extension(config) is not None:
        return False
    if not checkpoints(config.output_dir) or config.train.resume == "never":
        return False
    check_same_run(config, config.output_dir)
    newest = latest_valid_checkpoint(config.output_dir)
    finished = newest is not None and read_progress(newest).finished
    if finished:
        check_same_source(config, config.output_dir)
    return finished


def _build_run(
    config: RunConfig,
    accelerator: Accelerator,
    runtime: RuntimeSettings,
    lock: FileLock,
    checkpoint: Path | None,
    session_start_s: float,
) -> TrainingRun:
    args, is_main = config.train, accelerator.is_main_process
    data = _open_data(config, accelerator, checkpoint)
    set_seed(args.seed)
    model = _build_model(config, data, checkpoint)
    ema, optimizers = prepare_to_train(model, args, runtime)
    check_device(model, data.dataset, accelerator.device, runtime.precision)
    prepared_model, optimizers = prepare(accelerator, model, optimizers, reduce_dtype=args.reduce_dtype)
    if ema:
        ema.place_like(model)
    progress = TrainState(window_order=ORDER_VERSION)
    if checkpoint:
        load_checkpoint(TrainedState(accelerator, model, optimizers, ema), checkpoint)
        progress = read_progress(checkpoint)
        _check_window_order(progress, checkpoint)
    with translate_machine_errors(config, runtime):
        if is_main:
            prepare_run_dir(config, data.manifest, checkpoint, progress)
        accelerator.wait_for_everyone()

        peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        if is_main:
            first_step = progress.step + 1
            write_environment(config.output_dir, accelerator, runtime, peak, first_step=first_step)
            log_run_plan(config, accelerator, runtime, model.config, data.manifest, peak, step=progress.step)
        eos_token_id = data.manifest.eos_token_id
        started_s = session_start_s - progress.seconds
        return TrainingRun(
            config=config,
            accelerator=accelerator,
            runtime=runtime,
            tokenizer=data.tokenizer,
            dataset=data.dataset,
            validation=list(iter_documents(data.validation_tokens, eos_token_id, limit=args.eval_stories)),
            validation_prompts=data.validation_prompts,
            model=model,
            prepared_model=prepared_model,
            optimizers=optimizers,
            ema=ema,
            progress=progress,
            recorder=_build_recorder(config, accelerator, data.manifest, step=progress.step),
            display=ProgressDisplay(
                args.max_steps,
                first_step=progress.step,
                enabled=is_main,
                end_s=None if args.max_minutes is None else started_s + 60 * args.max_minutes,
            ),
            peak_flops=peak,
            writer=_checkpoint_writer(config, model),
            lock=lock,
            stop=StopRequest(stop_on_hangup=args.on_hangup == "stop" or is_launched()),
            started_s=started_s,
            timer_start_step=progress.step,
        )


def _checkpoint_writer(config: RunConfig, model: TinyStoriesForCausalLM) -> CheckpointWriter | None:
    if not config.train.sharded_checkpoints:
        return None
    if not is_sharded(model):
        logger.info("train.sharded_checkpoints (True) has no effect: FSDP2 does not shard the model")
        return None
    return CheckpointWriter()


def _check_window_order(progress: TrainState, checkpoint: Path) -> None:
    """Warn if another version ordered the windows of `checkpoint`; from here on this one does."""
    if progress.window_order != ORDER_VERSION:
        logger.warning(
            "%s was written by a version with another order of the training windows: this epoch repeats some "
            "and omits others; to avoid it, resume with that version",
            checkpoint,
        )
        progress.window_order = ORDER_VERSION


def _open_data(config: RunConfig, accelerator: Accelerator, checkpoint: Path | None) -> _TrainingData:
    """Prepare the data, main process first, and open them.

    Raises:
        UserError: the data cannot be prepared, or differ from those of the run of `checkpoint`.
    """
    data_dir = config.data.data_dir
    packing_class(config.data.packing)  # raises before the data are prepared
    manifest = main_process_first(accelerator, lambda: ensure_prepared(config.data, config.tokenizer))
    set_step_timeout(accelerator)
    if checkpoint:
        check_same_data(manifest, run_dir_of(checkpoint))
    tokenizer = load_tokenizer(str(data_dir / "tokenizer"))
    validation_prompts = None
    if config.data.loss_on == "story":
        validation_prompts = open_prompt_lengths(data_dir, "validation", manifest)
    if config.data.streaming:
        dataset = open_stream(
            config.data,
            manifest,
            seed=config.train.seed,
            share=partial(broadcast_from_main, accelerator),
            position=read_progress(checkpoint).stream if checkpoint else None,
        )
    else:
        dataset = open_windows(config, manifest)
    return _TrainingData(
        manifest=manifest,
        tokenizer=tokenizer,
        dataset=dataset,
        validation_tokens=open_tokens(data_dir, "validation", manifest),
        validation_prompts=validation_prompts,
    )


def _build_model(config: RunConfig, data: _TrainingData, checkpoint: Path | None) -> TinyStoriesForCausalLM:
    """Build the model with random weights, or those of `model.init_from` in a new run."""
    vocab_size, eos_token_id = data.manifest.vocab_size, data.manifest.eos_token_id
    model_config = config.model_config(
        vocab_size=vocab_size, eos_token_id=eos_token_id, pad_token_id=data.tokenizer.pad_token_id
    )
    earlier_run = RunDir(run_dir_of(checkpoint)) if checkpoint else None
    model_config.training_data = training_data_record(data.manifest, earlier_run)
    if config.model.init_from and not checkpoint:
        return load_initial_weights(config.model.init_from, model_config, data.tokenizer)
    return TinyStoriesForCausalLM(model_config)


def _build_recorder(
    config: RunConfig, accelerator: Accelerator, manifest: Manifest, *, step: int
) -> RunRecorder:
    return RunRecorder(
        config.output_dir,
        step=step,
        entropy=entropy_per_token(manifest),
        enabled=accelerator.is_main_process,
        tracker=Tracker(accelerator, config, step=step),
    )
