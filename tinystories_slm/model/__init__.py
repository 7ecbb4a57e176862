"""Configuration and network of the model. The Hub stores both files: they import nothing of this package."""

from .configuration_tinystories import TinyStoriesConfig
from .modeling_tinystories import (
    CACHE_NAME,
    TinyStoriesForCausalLM,
    TinyStoriesModel,
    TinyStoriesPreTrainedModel,
)

__all__ = [
    "CACHE_NAME",
    "TinyStoriesConfig",
    "TinyStoriesForCausalLM",
    "TinyStoriesModel",
    "TinyStoriesPreTrainedModel",
]
