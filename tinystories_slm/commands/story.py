"""The story command: `make story`, for MINUTES=10 of any machine, with MORE=10 for ten more minutes."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tinystories_slm.commands.more_minutes import adopt_length
from tinystories_slm.commands.quickstart import EVAL_STORIES, run_quickstart
from tinystories_slm.commands.source_folders import use_own_folders
from tinystories_slm.config import RunConfig, run_config_of
from tinystories_slm.config.command_args.run import StoryArgs
from tinystories_slm.planning.session import plan_config


def run_story(args: StoryArgs, given: Collection[str] = ()) -> str:
    """Train the model of `args`, or train it on, print a summary with a new text, and return the text.

    `given` are the names of the options that the command line sets; a plan for `args.minutes` keeps them.

    Raises:
        UserError: a step rejects its input.
    """
    config = use_own_folders(run_config_of(args))
    if args.minutes is not None:
        config = _use_folders_of_minutes(config, given, args.minutes)
        config = plan_config(config, given, args.minutes, num_scored_after=EVAL_STORIES, law_file=args.law)
    return run_quickstart(adopt_length(config, args.more, given))


def _use_folders_of_minutes(config: RunConfig, given: Collection[str], minutes: float) -> RunConfig:
    """Return `config` with folders for this number of minutes, unless they were given."""
    suffix = f"_{minutes:g}min"
    if "output_dir" not in given:
        config = replace(config, output_dir=Path(f"{config.output_dir}{suffix}"))
    if "data.data_dir" not in given:
        data_dir = Path(f"{config.data.data_dir}{suffix}")
        config = replace(config, data=replace(config.data, data_dir=data_dir))
    return config
