"""Whether stories follow their prompts: the words, features, sentence and summary of a block."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm import grammar
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.data.instruct import InstructBlock, format_block, parse_block, prompt_text
from tinystories_slm.generation.engine import generate_batch
from tinystories_slm.generation.request import context_length, prepare_requests, prompt_token_ids

logger = logging.getLogger(__name__)

_NUM_PROMPTS = 64
_MAX_NEW_TOKENS = 512
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_QUOTE = re.compile('["\u201c\u201d]')
_VOWEL = re.compile("[aeiouy]")
_MIN_STEM = 3
_UNITS = {
    "grammar": "share of stories that the grammar accepts",
    "words": "share of requested words",
    "sentence": "share of requested sentences",
    "summary": "share of requested summaries",
}


class Share(NamedTuple):
    """Share of the parts of prompts that stories follow."""

    name: str
    """Kind of part; the figure of the real stories ends in `_real`."""
    value: float
    unit: str
    count: int


def measure_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[str], *, seed: int
) -> list[Share]:
    """Generate a story for each of the first 64 held-out prompts, and compare it with its prompt.

    A prompt counts if its whole block, with the real story, fits into the context of the model. Story i is
    sampled at the default parameters with the seed `seed` + i. Without such a prompt, log a warning and
    return an empty list.
    """
    blocks = _choose_blocks(model, tokenizer, held_out)
    if not blocks:
        logger.warning("none of the %s held-out stories is a block with a prompt", f"{len(held_out):,}")
        return []
    sampling = SamplingParams(max_new_tokens=_MAX_NEW_TOKENS)
    seeds = range(seed, seed + len(blocks))
    requests = prepare_requests(model, tokenizer, list(map(prompt_text, blocks)), seeds, sampling)
    results = generate_batch(model, tokenizer, requests, sampling, batch_size=len(blocks))
    parsed = [parse_block(result.text) for result in results]
    return compare_with_prompts(blocks, ["" if block is None else block.story for block in parsed])


def compare_with_prompts(blocks: Sequence[InstructBlock], stories: Sequence[str]) -> list[Share]:
    """Return the shares of words, features, sentences and summaries of the prompts that `stories` follow.

    After each share follows that of the real stories, those of `blocks`. Dialogue is two quotation marks. If
    the real stories are of the built-in grammar, it decides on the other features and on summaries; a story
    that it does not accept has none. Otherwise `unchecked` is the share of the other features.
    """
    is_grammar = all(_parse(block.story) is not None for block in blocks)
    followed, real = defaultdict(list), defaultdict(list)
    for block, story in zip(blocks, stories, strict=True):
        for checks, text in ((followed, story), (real, block.story)):
            for name, is_followed in _check(block, text, is_grammar):
                checks[name].append(is_followed)
    shares = []
    for name, checks in followed.items():
        unit = _UNITS.get(name, "share of stories that were to have it")
        shares += _share(name, checks, unit), _share(f"{name}_real", real[name], unit)
    if not is_grammar and (features := [name for block in blocks for name in block.features]):
        unchecked = [name != "Dialogue" for name in features]
        shares.append(_share("unchecked", unchecked, "share of requested features"))
    return shares


def is_word_used(word: str, story: str) -> bool:
    """Whether the story contains `word` as a whole word, in any case and with any regular ending.

    Two words are equal if they are equal without an ending: `s`, `es`, `ed`, `ing` or `'s`, with the usual
    change of the spelling (`cried`, `hoping`, `stopped`). At least three letters stay. Irregular forms (`ran`
    for `run`) are other words. Of several words, each must be there.
    """
    forms = {form for found in _WORD.findall(story.lower()) for form in _base_forms(found)}
    return all(_base_forms(part) & forms for part in word.lower().split())


def _check(block: InstructBlock, story: str, is_grammar: bool) -> Iterator[tuple[str, bool]]:
    """Yield each checked part of the prompt by its name, and whether `story` follows it."""
    for word in block.words:
        yield "words", is_word_used(word, story)
    if block.random_sentence is not None:
        yield "sentence", block.random_sentence in " ".join(story.split())
    parsed = _parse(story) if is_grammar else None
    for feature in block.features:
        if feature == "Dialogue":
            yield "dialogue", len(_QUOTE.findall(story)) >= 2
        elif is_grammar:
            yield feature.lower(), parsed is not None and feature in parsed.features
    if is_grammar and block.summary is not None:
        yield "summary", parsed is not None and parsed.summary == block.summary
    if is_grammar:
        yield "grammar", parsed is not None


def _choose_blocks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[str]
) -> list[InstructBlock]:
    context = context_length(model)
    blocks: list[InstructBlock] = []
    for text in held_out:
        block = parse_block(text)
        if block is None or not block.story or prompt_text(block) == prompt_text(InstructBlock()):
            continue
        if context is None or len(prompt_token_ids(model, tokenizer, format_block(block))) < context:
            blocks.append(block)
        if len(blocks) == _NUM_PROMPTS:
            break
    return blocks


def _parse(story: str) -> grammar.Story | None:
    try:
        return grammar.parse_story(story)
    except ValueError:
        return None


def _base_forms(word: str) -> set[str]:
    """Return the lower-case `word` and what it may be without its ending."""
    word = word.removesuffix("'s")
    forms = {word}
    if word.endswith("s") and not word.endswith("ss"):
        forms |= {word[:-1], word.removesuffix("es")}
    for ending in ("ed", "ing"):
        if word.endswith(ending):
            stem = word.removesuffix(ending)
            forms |= {stem, stem + "e"} if len(stem) >= _MIN_STEM else set()
            if stem[-1:] == stem[-2:-1]:
                forms.add(stem[:-1])
    for ending in ("ies", "ied"):
        if word.endswith(ending):
            forms.add(word.removesuffix(ending) + "y")
    return {form for form in forms if form == word or (len(form) >= _MIN_STEM and _VOWEL.search(form))}


def _share(name: str, checks: Sequence[bool], unit: str) -> Share:
    return Share(name, sum(checks) / len(checks), unit, len(checks))
