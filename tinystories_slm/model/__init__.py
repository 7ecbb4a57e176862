"""The model that travels to the Hub: configuration and network, importing nothing of this package."""

from .configuration_tinystories import TinyStoriesConfig
from .modeling_tinystories import TinyStoriesForCausalLM, TinyStoriesModel, TinyStoriesPreTrainedModel

__all__ = ["TinyStoriesConfig", "TinyStoriesForCausalLM", "TinyStoriesModel", "TinyStoriesPreTrainedModel"]
