"""Settings that Accelerate reads from its configuration file and from the environment.

`accelerate launch` passes its file on as environment variables. Each of them is set by the run, and then has
no effect, or is rejected: a run is what its configuration says.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import DistributedType, str_to_bool

from tinystories_slm.errors import UserError

logger = logging.getLogger(__name__)

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# Variable: the option that decides, and the value that the launcher sets by itself.
_OVERRIDDEN = {
    "ACCELERATE_DYNAMO_BACKEND": ("train.compile", "no"),
    "ACCELERATE_MIXED_PRECISION": ("train.mixed_precision", "no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("train.per_device_batch_size", "1"),
    "ACCELERATE_GRADIENT_CLIPPING": ("train.max_grad_norm", "none"),
}


def check_accelerate_env() -> None:
    """Check the settings that would change how the run is distributed.

    Raises:
        UserError: a setting is not supported, or is not a boolean.
    """
    for name, what in _UNSUPPORTED.items():
        if _read_flag(name):
            raise UserError(
                f"{name} ({os.environ[name]}): a run cannot use {what}; use a file of configs/accelerate/, "
                "or unset it"
            )
    if (device := os.environ.get("ACCELERATE_TORCH_DEVICE")) is not None:
        raise UserError(
            f"ACCELERATE_TORCH_DEVICE ({device}) cannot be used; select a GPU with CUDA_VISIBLE_DEVICES, or "
            "the CPU with ACCELERATE_USE_CPU=1"
        )
    _read_flag("ACCELERATE_USE_FSDP")


def use_cpu() -> bool:
    """Whether ACCELERATE_USE_CPU selects the CPU.

    Raises:
        UserError: it is not a boolean.
    """
    return _read_flag("ACCELERATE_USE_CPU")


def check_sharding(accelerator: Accelerator) -> None:
    """Check that FSDP shards the model if it is configured, and that models and checkpoints can be saved.

    Raises:
        UserError: names the setting.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError(
                f"fsdp_version ({plugin.fsdp_version}) must be 2; use configs/accelerate/gpu_8_fsdp2.yaml"
            )
        if (
            kind := getattr(plugin.state_dict_type, "name", str(plugin.state_dict_type))
        ) != "FULL_STATE_DICT":
            raise UserError(
                f"fsdp_state_dict_type ({kind}) must be FULL_STATE_DICT; use "
                "configs/accelerate/gpu_8_fsdp2.yaml"
            )
    elif _read_flag("ACCELERATE_USE_FSDP"):
        raise UserError(
            f"ACCELERATE_USE_FSDP ({os.environ['ACCELERATE_USE_FSDP']}) shards a model over GPU processes, "
            f"but this run has {accelerator.num_processes} on {accelerator.device.type}; unset it, or use "
            "another file of configs/accelerate/"
        )


def log_overridden_settings(precision: str) -> None:
    """Log each setting that another option decides, unless it is the default or the same."""
    for name, (option, default) in _OVERRIDDEN.items():
        value = os.environ.get(name, default)
        if value.lower() not in (default, "", precision):
            logger.info("%s (%s) has no effect: %s decides", name, value, option)


@contextlib.contextmanager
def translate_accelerate_errors() -> Iterator[None]:
    """Translate an error of Accelerate's own settings into one line that names what is set.

    Raises:
        UserError: Accelerate or torch rejected a setting, or could not join the processes.
    """
    try:
        yield
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        names = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_")))
        raise UserError(
            f"Accelerate cannot start: {reason}; correct or unset {', '.join(names) or 'its settings'}, or "
            "check the output of `accelerate env`"
        ) from error


def _read_flag(name: str) -> bool:
    """Return the value of a boolean environment variable; false if it is unset.

    Raises:
        UserError: it is not a boolean.
    """
    value = os.environ.get(name, "false")
    try:
        return bool(str_to_bool(value))
    except ValueError:
        raise UserError(f"{name} ({value}) must be true or false; correct or unset it") from None
