"""The built-in corpus: stories for children whose probability, and so entropy, is known exactly."""

from .stories import (
    VERSION,
    Story,
    entropy,
    log_prob,
    num_stories,
    tell_stories,
    tell_story,
)

__all__ = [
    "VERSION",
    "Story",
    "entropy",
    "log_prob",
    "num_stories",
    "tell_stories",
    "tell_story",
]
