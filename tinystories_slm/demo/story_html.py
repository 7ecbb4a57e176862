"""A story as HTML: growing text, or words with the probabilities behind them."""

import json
from typing import Any

from jinja2 import Template

from tinystories_slm.demo.live_stories import LiveStory
from tinystories_slm.demo.token_alternatives import Alternative, Word
from tinystories_slm.runs.page import load_template

_ENDINGS = {
    "stop": "the model ended the story",
    "length": "reached the length, or the end of the model's context",
    "stopped": "stopped",
}
# Classes of words by their probability, from expected (0) to surprising.
_LEVELS = (0.5, 0.2, 0.05, 0.01)


def render_story(story: LiveStory) -> str:
    """Return the HTML of `story`; `story.js` reads its attribute `data-story`."""
    if story.ending is None:
        return render_text(story.text, is_growing=True)
    num_new_tokens = max(0, len(story.token_ids) - len(story.start.request.token_ids))
    return _load().render(
        words=[_describe_word(word, story) for word in story.words],
        data=json.dumps(_story_data(story), ensure_ascii=False, separators=(",", ":")),
        footer=f"{num_new_tokens} tokens, {_ENDINGS[story.ending]}",
    )


def render_text(text: str, *, is_growing: bool = False) -> str:
    """Return the HTML of a story without figures."""
    return _load().render(text=text, data=None, is_growing=is_growing)


def _load() -> Template:
    return load_template("story.html.jinja", "tinystories_slm.demo")


def _describe_word(word: Word, story: LiveStory) -> dict[str, Any]:
    """Return the text of a word, the blanks before it, and its classes."""
    text = word.text.lstrip()
    classes = []
    if not text:
        text, classes = ("¶", ["mark"]) if word.text else ("∎", ["mark"])
    indices = [one.index for one in word.tokens]
    if indices[-1] < story.start.num_prompt_tokens:
        classes.append("given")
    elif not set(indices).isdisjoint(story.start.chosen):
        classes.append("chosen")
    else:
        classes.append(f"level{sum(word.probability < level for level in _LEVELS)}")
    blanks = word.text[: len(word.text) - len(word.text.lstrip())]
    # The mark of a line break stands before the break.
    before, after = ("", blanks) if "mark" in classes else (blanks, "")
    return {"before": before, "text": text, "after": after, "classes": " ".join(classes)}


def _story_data(story: LiveStory) -> dict[str, Any]:
    """Return the figures behind the words, with short keys: five alternatives per token."""
    return {
        "ids": story.token_ids,
        "prompt": story.start.num_prompt_tokens,
        "chosen": story.start.chosen,
        "words": [
            {
                "p": _rounded(word.probability),
                "tokens": [
                    {
                        "at": one.index,
                        "token": _describe_token(one.token),
                        "others": [_describe_token(other) for other in one.alternatives],
                    }
                    for one in word.tokens
                ],
            }
            for word in story.words
        ],
    }


def _describe_token(token: Alternative) -> dict[str, Any]:
    return {"id": token.token_id, "t": token.text, "p": _rounded(token.probability)}


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else float(f"{probability:.4g}")
