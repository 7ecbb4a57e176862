"""Configuration: the options of a run, typed and validated, from YAML files and flags."""

from tinystories_slm.config.parse import parse
from tinystories_slm.config.run_config import (
    RunConfig,
    flatten,
    load_config,
    parse_config,
    replace_options,
    run_config_of,
    save_config,
    to_dict,
)
from tinystories_slm.config.sections import (
    BatchArgs,
    CheckpointArgs,
    DataArgs,
    LoggingArgs,
    ModelArgs,
    OptimizerArgs,
    RuntimeArgs,
    ScheduleArgs,
    TokenizerArgs,
    TrainArgs,
)

__all__ = [
    "BatchArgs",
    "CheckpointArgs",
    "DataArgs",
    "LoggingArgs",
    "ModelArgs",
    "OptimizerArgs",
    "RunConfig",
    "RuntimeArgs",
    "ScheduleArgs",
    "TokenizerArgs",
    "TrainArgs",
    "flatten",
    "load_config",
    "parse",
    "parse_config",
    "replace_options",
    "run_config_of",
    "save_config",
    "to_dict",
]
