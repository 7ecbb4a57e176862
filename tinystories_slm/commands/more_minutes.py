"""Length of the story command's run, if it was trained on or is to be: `--more MINUTES`."""

import math
from collections.abc import Collection
from dataclasses import replace

from tinystories_slm.config import RunConfig
from tinystories_slm.config.sections import MAY_CHANGE_ON_EXTENSION
from tinystories_slm.errors import UserError
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.checkpoints import latest_valid_checkpoint, read_progress
from tinystories_slm.training.extension import find_branch

# The minutes end the run. More steps than the speed so far allows, as the next machine may be faster.
_STEP_MARGIN = 4


def adopt_length(config: RunConfig, more: float | None, given: Collection[str] = ()) -> RunConfig:
    """Return `config` with the length of the run in `output_dir`, if it is known, and `more` minutes.

    It is known of an extended run, and of a finished one if no option in `given` sets another length.

    The minutes count from the checkpoint that the extension continues: the command takes that long. An
    extension that was interrupted is resumed with its own length. The stories stay those of the run.

    Raises:
        UserError: `more` is set, and there is no run or not enough time.
    """
    run_dir = RunDir(config.output_dir)
    found, is_extended = run_dir.load_config(), bool(run_dir.read_extensions())
    newest = latest_valid_checkpoint(run_dir.path) if found else None
    is_finished = newest is not None and read_progress(newest).finished
    keeps_length = is_extended or (is_finished and not MAY_CHANGE_ON_EXTENSION & set(given))
    if more is None and (not keeps_length or config.train.resume == "never"):
        return config
    if found is None or newest is None:
        raise UserError(
            f"more ({more:g}): must find a finished run in output_dir ({run_dir.path}); run the same command "
            "without it first"
        )
    length = {name: getattr(found.train, name) for name in ("max_steps", "max_minutes", "rewarm_lr_rate")}
    config = replace(
        config,
        data=replace(config.data, max_stories=found.data.max_stories),
        train=replace(config.train, **length),
    )
    end = read_progress(newest)
    if more is None or (is_extended and not end.finished):
        return config
    start = read_progress(find_branch(config, newest, end))
    max_minutes = start.seconds / 60 + more
    if 60 * max_minutes <= end.seconds:
        again = (end.seconds - start.seconds) / 60
        raise UserError(
            f"more ({more:g}): must be above the {again:.2f} minutes of the decay, which are trained again; "
            "set a larger number"
        )
    num_steps = math.ceil(_STEP_MARGIN * 60 * more * end.step / max(end.seconds, 1e-3))
    max_steps = end.step + config.train.warmup_steps + num_steps
    train = replace(config.train, max_minutes=max_minutes, max_steps=max_steps, resume="extend")
    return replace(config, train=train)
