"""The train command: a configuration as it is, or a plan for a number of minutes."""

from collections.abc import Collection
from pathlib import Path

from tinystories_slm.config import run_config_of
from tinystories_slm.config.command_args.run import TrainCommandArgs
from tinystories_slm.planning.session import plan_config
from tinystories_slm.training import train


def run_train(args: TrainCommandArgs, given: Collection[str]) -> Path:
    """Train the model of `args`, or resume its run, and return the run directory.

    Raises:
        UserError: a step rejects its input.
        TrainingInterrupted: a stop signal arrived; the current step was saved.
    """
    config = run_config_of(args)
    if args.minutes is not None:
        config = plan_config(config, given, args.minutes, law_file=args.law)
    return train(config)
