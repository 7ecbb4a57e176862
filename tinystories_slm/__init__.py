"""Train small language models on short stories and give them to the Hugging Face world.

Importing the package registers the model with transformers' Auto classes, so that models trained
here load without `trust_remote_code`.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM, TinyStoriesModel

__version__ = version("tinystories_slm")

AutoConfig.register(TinyStoriesConfig.model_type, TinyStoriesConfig, exist_ok=True)
AutoModel.register(TinyStoriesConfig, TinyStoriesModel, exist_ok=True)
AutoModelForCausalLM.register(TinyStoriesConfig, TinyStoriesForCausalLM, exist_ok=True)

__all__ = ["TinyStoriesConfig", "TinyStoriesForCausalLM", "TinyStoriesModel", "__version__"]
