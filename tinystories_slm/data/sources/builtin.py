"""The built-in corpus as a source: stories that `tinystories_slm.grammar` generates."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial

from tinystories_slm import grammar
from tinystories_slm.data.instruct import InstructBlock, format_block
from tinystories_slm.data.sources.story_source import Splits, StorySource

BUILTIN = "builtin"
"""Value of `data.source` for the built-in corpus."""
BUILTIN_INSTRUCT = "builtin-instruct"
"""Value of `data.source` for its stories in blocks as of TinyStories-Instruct."""
BUILTIN_STORIES = 40_000
"""Number of stories of either if `data.max_stories` is null."""
_NUM_WORDS = 3  # as in the published blocks
_PART_PROBABILITY = 0.5
# A word of every fifth story, such as "said", is used whether the prompt has it or not.
_COMMON_SHARE = 0.2
_COMMON_SAMPLE = 1000
_WORD = re.compile(r"\b[a-z]{3,}\b")  # not names, nor the first word of a sentence
_SENTENCE = re.compile(r"(?:^|(?<=[.!?] ))[A-Z][^.!?\"\n]*\.(?= |$)", re.MULTILINE)  # without speech


class BuiltinSource(StorySource):
    """The built-in corpus; its revision is `grammar VERSION`."""

    is_builtin_corpus = True
    label = "the built-in corpus of tinystories_slm"
    license = "MIT, like the package that generates them"

    @classmethod
    def matches(cls, value: str) -> bool:
        return value == BUILTIN

    def resolve_revision(self, requested: str | None) -> str:
        return f"grammar {grammar.VERSION}"

    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
        return {"train": partial(grammar.generate_corpus, max_stories or BUILTIN_STORIES, seed=0)}

    def folder_name(self) -> None:
        return None


class BuiltinInstructSource(StorySource):
    """The stories of the built-in corpus in blocks as of TinyStories-Instruct; the prompts are true of them.

    The entropy of the blocks is not known, only that of the stories without prompts.
    """

    label = "the built-in corpus of tinystories_slm with prompts"
    license = BuiltinSource.license

    @classmethod
    def matches(cls, value: str) -> bool:
        return value == BUILTIN_INSTRUCT

    def resolve_revision(self, requested: str | None) -> str:
        return f"grammar {grammar.VERSION}, blocks 1"

    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
        return {"train": partial(_generate_blocks, max_stories or BUILTIN_STORIES, seed=0)}

    def folder_name(self) -> str:
        return self.value


def generate_block(seed: int, index: int) -> InstructBlock:
    """Generate a block of story number `index` of the built-in corpus with this `seed`.

    Each part of the prompt is there with probability 1/2: three words of the story that are not common in
    the corpus, one or more features, the summary, and a sentence.
    """
    story = grammar.generate_story(seed, index)
    rng = random.Random(f"{seed}/{index}/prompt")
    has_words, has_features, has_summary, has_sentence = (rng.random() < _PART_PROBABILITY for _ in range(4))
    features = rng.sample(story.features, rng.randint(1, len(story.features)))
    return InstructBlock(
        words=tuple(rng.sample(_uncommon_words(story.text), _NUM_WORDS)) if has_words else (),
        features=tuple(features) if has_features else (),
        summary=story.summary if has_summary else None,
        random_sentence=rng.choice(_SENTENCE.findall(story.text)) if has_sentence else None,
        story=story.text,
    )


def _uncommon_words(text: str) -> list[str]:
    return sorted(set(_WORD.findall(text)) - _common_words())


def _generate_blocks(num_blocks: int, *, seed: int) -> Iterator[str]:
    return (format_block(generate_block(seed, index)) for index in range(num_blocks))


@cache
def _common_words() -> frozenset[str]:
    """Return the words of more than a fifth of the stories."""
    stories = grammar.generate_corpus(_COMMON_SAMPLE, seed=0)
    counts = Counter(word for story in stories for word in set(_WORD.findall(story)))
    return frozenset(word for word, count in counts.items() if count > _COMMON_SHARE * _COMMON_SAMPLE)
