"""Translate out-of-memory, disk and file errors during a run into one-line messages."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from safetensors import SafetensorError
from torch.distributed import DistError

from tinystories_slm.config import RunConfig
from tinystories_slm.errors import ProcessLost, UserError
from tinystories_slm.hardware.launch_env import local_process_rank, process_rank
from tinystories_slm.training.runtime import RuntimeSettings

logger = logging.getLogger(__name__)

_SAVED = "saved files are intact; run the same command to resume"
# Messages of a bare RuntimeError in torch: from the CPU allocator, and for an incomplete file.
_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory")
# From gloo, which raises bare RuntimeErrors.
_LOST_PROCESS_MESSAGES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
_WRITE_ERROR_MESSAGES = ("inline_container", "PytorchStreamWriter", "unexpected pos")


@contextlib.contextmanager
def translate_machine_errors(config: RunConfig, runtime: RuntimeSettings) -> Iterator[None]:
    """Translate errors of the machine into a `UserError` that names the option to change.

    Other errors pass through.

    Raises:
        ProcessLost: the connection to another process of the launch was lost.
        UserError: the disk is full, the run directory became read-only, the data disappeared, or the
            memory is too small.
    """
    try:
        yield
    except ConnectionError:
        raise  # an OSError, but of a pipe without a reader or of the network
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, DistError) or _message_contains(error, _LOST_PROCESS_MESSAGES):
            raise ProcessLost(f"another process of the launch is lost: {reason}; {_SAVED}") from error
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _message_contains(
            error, _OUT_OF_MEMORY_MESSAGES
        ):
            raise _machine_error(
                f"out of memory; halve train.per_device_batch_size ({runtime.per_device_batch_size}), "
                f"which changes the memory use but not the result; {_SAVED}"
            ) from error
        if isinstance(error, OSError) and str(error.filename).startswith(str(config.data.data_dir)):
            raise _machine_error(
                f"data.data_dir ({config.data.data_dir}) can no longer be read: {reason}; restore it, or let "
                f"the same command prepare the data again; {_SAVED}"
            ) from error
        if (
            isinstance(error, (OSError, SafetensorError))
            or _message_contains(error, _WRITE_ERROR_MESSAGES)
            or _is_rust_os_error(error)
        ):
            raise _machine_error(
                f"output_dir ({config.output_dir}) can no longer be written to: {reason}; free disk space or "
                f"make the directory writable; {_SAVED}"
            ) from error
        raise


def _machine_error(message: str) -> UserError:
    """Return a `UserError`, and log it immediately if this is not the first process of its machine.

    Only that process prints its error at exit. If another process fails alone, the rest only see that it is
    gone.
    """
    if local_process_rank():
        logger.error("process %d: %s", process_rank(), message)
    return UserError(message)


def _is_rust_os_error(error: Exception) -> bool:
    """Whether `error` is the bare Exception that tokenizers raises for an OSError."""
    return type(error) is Exception and "(os error " in str(error)


def _message_contains(error: Exception, parts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(part in str(error) for part in parts)
