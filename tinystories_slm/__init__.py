"""Train small language models on short stories and publish them for Hugging Face transformers.

Importing the package registers the model with transformers' Auto classes, so that models trained here load
without `trust_remote_code`.
"""

import multiprocessing
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

try:
    __version__ = version("tinystories_slm")
except PackageNotFoundError:  # a copy of the package that is not installed, as in a Space
    __version__ = "unknown"
__all__ = ["TinyStoriesConfig", "TinyStoriesForCausalLM", "TinyStoriesModel", "__version__"]


def register_auto_classes() -> None:
    """Register the model with transformers' Auto classes; a second call changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM, TinyStoriesModel

    AutoConfig.register(TinyStoriesConfig.model_type, TinyStoriesConfig, exist_ok=True)
    AutoModel.register(TinyStoriesConfig, TinyStoriesModel, exist_ok=True)
    AutoModelForCausalLM.register(TinyStoriesConfig, TinyStoriesForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_auto_classes()
    from tinystories_slm import model

    return getattr(model, name)


def _is_command() -> bool:
    """Return whether this process is a command of this package: it registers after it has read its options.

    torch and transformers take 3 s and more on two cores; `--help` and a rejected option need neither.
    """
    program = Path(sys.argv[0])
    is_script = program.suffix == ".py" and program.absolute().parent == Path(__file__).parents[1] / "scripts"
    is_main = program.stem == "tinystories-slm" or program.name == "-m"  # `python -m tinystories_slm`
    return (is_script or is_main) and multiprocessing.parent_process() is None


if not _is_command():
    register_auto_classes()
