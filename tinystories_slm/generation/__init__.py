"""Stories from prompts, through transformers' `generate()`."""

from tinystories_slm.generation.sampling import Sampling
from tinystories_slm.generation.telling import Story, StoryStream, begin, generate_stories, tell_stories

__all__ = ["Sampling", "Story", "StoryStream", "begin", "generate_stories", "tell_stories"]
