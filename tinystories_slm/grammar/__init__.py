"""Built-in corpus: a grammar of children's stories with exactly known probabilities and entropy."""

from .diagnosis import Diagnosis, diagnose
from .stories import (
    VERSION,
    Story,
    entropy,
    generate_corpus,
    generate_story,
    log_prob,
    num_stories,
    parse_story,
)

__all__ = [
    "VERSION",
    "Diagnosis",
    "Story",
    "diagnose",
    "entropy",
    "generate_corpus",
    "generate_story",
    "log_prob",
    "num_stories",
    "parse_story",
]
