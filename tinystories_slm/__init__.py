"""Train small language models on short stories and publish them for Hugging Face transformers.

Importing the package registers the model with transformers' Auto classes, so that models trained here load
without `trust_remote_code`.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("tinystories_slm")
except PackageNotFoundError:  # a copy of the package that is not installed, as in a Space
    __version__ = "unknown"
__all__ = ["TinyStoriesConfig", "TinyStoriesForCausalLM", "TinyStoriesModel", "__version__"]


def _register_auto_classes() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM, TinyStoriesModel

    AutoConfig.register(TinyStoriesConfig.model_type, TinyStoriesConfig, exist_ok=True)
    AutoModel.register(TinyStoriesConfig, TinyStoriesModel, exist_ok=True)
    AutoModelForCausalLM.register(TinyStoriesConfig, TinyStoriesForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register_auto_classes()
    from tinystories_slm import model

    return getattr(model, name)


# A command that only prints its options needs neither torch nor transformers: 3 s and more on two cores. Not
# `-h`, which other programs use for a host or a height.
if "--help" not in sys.argv[1:]:
    _register_auto_classes()
