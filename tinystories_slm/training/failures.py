"""What a machine may refuse in the middle of a run, said in one line."""

import contextlib
import logging
import os
from collections.abc import Iterator

import torch
from safetensors import SafetensorError

from tinystories_slm.config import RunConfig
from tinystories_slm.errors import InputError
from tinystories_slm.training.settings import Settings

logger = logging.getLogger(__name__)

_SAVED = "nothing that was saved is lost, and the same command goes on from there"
# What torch says in a bare RuntimeError: of a CPU's allocator, and of a file it could not finish.
_NO_MEMORY = ("can't allocate memory", "not enough memory")
_NOT_WRITTEN = ("inline_container", "PytorchStreamWriter", "unexpected pos")


@contextlib.contextmanager
def plainly(config: RunConfig, settings: Settings) -> Iterator[None]:
    """Turn what the machine refuses into the knob to turn; anything else passes through.

    Raises:
        InputError: for a full disk, a folder that became read-only, data that vanished, too little memory.
    """
    try:
        yield
    except ConnectionError:
        raise  # not of the disk: a pipe that nobody reads, a network
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _says(error, _NO_MEMORY):
            raise _told(
                f"out of memory; halve train.per_device_batch_size ({settings.per_device_batch_size}), "
                f"which changes memory and not the result; {_SAVED}"
            ) from error
        if isinstance(error, OSError) and str(error.filename).startswith(str(config.data.data_dir)):
            raise _told(
                f"data.data_dir ({config.data.data_dir}) cannot be read any more: {reason}; mend it, or "
                f"let the same command prepare the data again; {_SAVED}"
            ) from error
        if isinstance(error, (OSError, SafetensorError)) or _says(error, _NOT_WRITTEN) or _is_rusts(error):
            raise _told(
                f"output_dir ({config.output_dir}) cannot be written to any more: {reason}; free some space "
                f"or mend the folder; {_SAVED}"
            ) from error
        raise


def _told(message: str) -> InputError:
    """The refusal; where this is not the first process, the only one to speak at the end, told at once.

    The machine may refuse one process alone, and the others then only see that it is gone.
    """
    if rank := int(os.environ.get("RANK", 0)):
        logger.error("process %d: %s", rank, message)
    return InputError(message)


def _is_rusts(error: Exception) -> bool:
    """Whether it is what tokenizers makes of an OSError: a bare Exception."""
    return type(error) is Exception and "(os error " in str(error)


def _says(error: Exception, signs: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
