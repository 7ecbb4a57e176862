"""A run: model, optimizers, data and records, built from the configuration or from a checkpoint."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    set_seed,
)
from filelock import FileLock
from torch import nn
from transformers import PreTrainedTokenizerBase

from tinystories_slm.config import RunConfig
from tinystories_slm.data.prepare import open_tokens, prepared
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.data.windows import Windows, read_stories
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.averaging import WeightAverage
from tinystories_slm.training.checkpoints import (
    Progress,
    check_same_data,
    check_same_run,
    checkpoints,
    load_checkpoint,
    newest_intact,
    read_progress,
)
from tinystories_slm.training.failures import plainly
from tinystories_slm.training.fused import fuse
from tinystories_slm.training.initial import load_initial_weights
from tinystories_slm.training.optim import build_optimizers
from tinystories_slm.training.processes import (
    build_accelerator,
    decided_by_first,
    expect_answers,
    main_process_first,
)
from tinystories_slm.training.run_folder import (
    check_resume,
    claim_run_folder,
    leave_run_folder,
    prepare_run_folder,
    run_of,
)
from tinystories_slm.training.schedule import peak_lr
from tinystories_slm.training.settings import Settings
from tinystories_slm.training.sharding import whole_model
from tinystories_slm.training.signals import StopRequest
from tinystories_slm.training.watching.display import Display, Stopwatch, announce
from tinystories_slm.training.watching.environment import write_environment
from tinystories_slm.training.watching.estimate import Peak, flops_per_token, peak_flops, utilisation
from tinystories_slm.training.watching.record import entropy_per_token
from tinystories_slm.training.watching.trackers import Tracker, tracker_options
from tinystories_slm.training.watching.tracking import RunRecord


@dataclass
class Run:
    """A run at `progress.step`; see `start_run`."""

    config: RunConfig
    accelerator: Accelerator
    settings: Settings
    """What every `auto` of `config` stands for here."""
    tokenizer: PreTrainedTokenizerBase
    windows: Windows
    validation: list[np.ndarray]
    """Token ids of the validation stories."""
    model: TinyStoriesForCausalLM
    """The model itself: to save, to evaluate, to tell stories."""
    prepared_model: nn.Module
    """The same as Accelerate wrapped it: to train."""
    optimizers: list[torch.optim.Optimizer]
    average: WeightAverage | None
    """Of the weights, where `train.ema_decay` asks for one."""
    progress: Progress
    record: RunRecord
    display: Display
    peak: Peak
    """Of the device of this process."""
    lock: FileLock
    """Of the run folder, held until `close`."""
    started_s: float
    """When this session began, by `time.perf_counter`, less the seconds of the sessions before it."""
    stop: StopRequest = field(default_factory=StopRequest)
    stop_agreed: bool = False
    """Whether every process knows that one of them was asked to stop."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    timed_from: int = 0
    """The step at which `stopwatch` was started; steps of an earlier session took none of its time."""
    seconds_per_token: float = 0.0
    """Of training, over the steps of the last log; 0 before it."""
    local_losses: list[torch.Tensor] = field(default_factory=list)
    """This process's, one a step, still on the device (reading one would wait for it)."""
    unread_finite: list[torch.Tensor] = field(default_factory=list)
    """Whether each step since the last log or save had a finite gradient, where that waits on the device."""

    @property
    def reads_each_step(self) -> bool:
        """Whether the loop looks at each gradient's norm, for which an accelerator would have to be waited.

        It need not where AdamW alone trains: it takes from the device whether to step (see
        `loop._skip_unless_finite`). Muon cannot, and under FSDP and with fp16's scaler others decide.
        """
        accelerator = self.accelerator
        return (
            accelerator.device.type == "cpu"
            or self.config.train.optimizer != "adamw"
            or accelerator.scaler is not None
            or accelerator.distributed_type == DistributedType.FSDP
        )

    @property
    def tokens(self) -> int:
        """Training tokens read so far."""
        return self.progress.step * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        width = self.config.model.hidden_size
        return peak_lr(self.config.train, hidden_size=width, tokens_per_step=self.tokens_per_step)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds over all sessions, to this moment."""
        return time.perf_counter() - self.started_s

    @property
    def closing_seconds(self) -> float:
        """What the end of the run will take, going by the last evaluation and the last save.

        Before there was one: an evaluation reads each token forward, a third of what training does to it.
        """
        evaluation_s = self.progress.evaluation_seconds
        if not evaluation_s:
            evaluation_s = self.seconds_per_token / 3 * sum(map(len, self.validation))
        return evaluation_s + self.progress.saving_seconds

    def utilisation(self, tokens_per_second: float) -> float:
        """Model-FLOP utilisation at this speed; see `estimate.utilisation`."""
        per_token = flops_per_token(self.model.config, self.config.data.seq_len)
        num_processes = self.accelerator.num_processes
        share = utilisation(tokens_per_second, per_token, self.peak, num_processes=num_processes)
        if share <= 1.0 or not self.peak.measured:
            return share
        # More than all: something else had the machine while the peak was measured.
        again = peak_flops(self.accelerator.device, self.accelerator.mixed_precision)
        self.peak = max(self.peak, again, key=lambda peak: peak.flops_per_second)
        if self.accelerator.is_main_process:
            write_environment(self.config.output_dir, self.accelerator, self.settings, self.peak)
        return utilisation(tokens_per_second, per_token, self.peak, num_processes=num_processes)

    def model_to_keep(self) -> TinyStoriesForCausalLM:
        """What is evaluated and saved to best/ and last/: the averaged weights where there are such, else
        the model itself; whole, so every process has to call this."""
        return self.average.model if self.average else whole_model(self.model)

    def due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens now."""
        return self.progress.step % every == 0 or self.progress.finished

    def close(self) -> None:
        """Give the run folder free."""
        self.display.close()
        self.record.close()
        self.lock.release()


def start_run(config: RunConfig) -> Run:
    """Data, model and optimizer, at the first step or where a checkpoint stands.

    Whatever can be wrong is refused before the data are prepared and before anything is overwritten.
    """
    began_s = time.perf_counter()
    accelerator, settings = build_accelerator(config, **tracker_options(config))
    lock = FileLock(config.output_dir / "run.lock", blocking=False)
    checkpoint = decided_by_first(accelerator, lambda: claim_run_folder(config, lock))
    try:
        return _build_run(config, accelerator, settings, lock, checkpoint, began_s)
    except BaseException:
        if lock.is_locked:
            leave_run_folder(config.output_dir, lock)
        raise


def _build_run(
    config: RunConfig,
    accelerator: Accelerator,
    settings: Settings,
    lock: FileLock,
    checkpoint: Path | None,
    began_s: float,
) -> Run:
    args = config.train
    manifest = main_process_first(accelerator, lambda: prepared(config.data, config.tokenizer))
    expect_answers(accelerator)
    if checkpoint:
        check_same_data(manifest, run_of(checkpoint))
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
    model_config = config.model_config(vocab_size=manifest.vocab_size, eos_token_id=manifest.eos_token_id)
    if config.model.init_from and not checkpoint:
        model = load_initial_weights(config.model.init_from, model_config, tokenizer)
    else:
        model = TinyStoriesForCausalLM(model_config)
    model.set_attn_implementation(settings.attention)
    average = WeightAverage(model, args.ema_decay) if args.ema_decay is not None else None
    if settings.fused:
        fuse(model)
    if settings.compiled:
        for layer in model.model.layers:
            layer.compile()  # in place: every name and every saved file stays as it is without
    optimizers = build_optimizers(model, args, precision=settings.precision)
    prepared_model, *optimizers = accelerator.prepare(model, *optimizers)
    if average:
        average.model.to(accelerator.device)
    progress = Progress()
    if checkpoint:
        load_checkpoint(accelerator, checkpoint, average)
        progress = read_progress(checkpoint)
    with plainly(config, settings):
        if accelerator.is_main_process:
            prepare_run_folder(config, manifest, checkpoint, progress)
        accelerator.wait_for_everyone()

        peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        if accelerator.is_main_process:
            write_environment(config.output_dir, accelerator, settings, peak)
            announce(config, accelerator, settings, model_config, manifest, peak, step=progress.step)
        return Run(
            config=config,
            accelerator=accelerator,
            settings=settings,
            tokenizer=tokenizer,
            windows=windows,
            validation=list(read_stories(validation, manifest.eos_token_id, limit=args.eval_stories)),
            model=model,
            prepared_model=prepared_model,
            optimizers=optimizers,
            average=average,
            progress=progress,
            record=RunRecord(
                config.output_dir,
                step=progress.step,
                entropy=entropy_per_token(manifest),
                written=accelerator.is_main_process,
                tracker=Tracker(accelerator, config, step=progress.step),
            ),
            display=Display(args.max_steps, first_step=progress.step, shown=accelerator.is_main_process),
            peak=peak,
            lock=lock,
            started_s=began_s - progress.seconds,
            timed_from=progress.step,
        )


def finished(config: RunConfig) -> bool:
    """Whether the run folder holds this very run, trained to its end, and it is not to start over.

    Raises:
        InputError: it holds another run, or an older checkpoint of it is asked for.
    """
    check_resume(config)
    if not checkpoints(config.output_dir) or config.train.resume == "never":
        return False
    check_same_run(config, config.output_dir)
    newest = newest_intact(config.output_dir)
    return newest is not None and read_progress(newest).finished
