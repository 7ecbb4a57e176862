"""Tokens at which the texts of a model start and end: one rule for prompts and for scored stories."""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.model import TinyStoriesConfig

_PROBES = ("a", "e", "1", "!")


@dataclass(frozen=True)
class TextBoundaries:
    """Token ids around each text of one model."""

    start_ids: list[int]
    """Ids before each text; empty if the model reads texts without a start token."""
    context_ids: list[int]
    """Ids that the first token of a scored text, and an empty prompt, follow; empty without bos and eos."""
    end_id: int | None
    """Id after each text; None without an eos token."""
    stop_ids: list[int]
    """Ids that end a generated text: the tokenizer's, then those of the model's `generation_config`."""


def text_boundaries(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TextBoundaries:
    """Return the boundaries that `model` was trained with, as far as its files state them.

    - Models trained here read the eos token before and after each text, whatever their tokenizer adds.
    - For other models the tokenizer's template decides, as in Llama (`<s>`).
    - A tokenizer without a template, with one token for start and end, separates texts by it, as in GPT-2.
    """
    bos, eos, stop_ids = tokenizer.bos_token_id, tokenizer.eos_token_id, stop_token_ids(model, tokenizer)
    if _is_own(model):
        return TextBoundaries([eos], [eos], eos, stop_ids)
    before, after = _template_ids(tokenizer)
    start_ids = before or ([eos] if bos == eos and eos is not None else [])
    return TextBoundaries(
        start_ids=start_ids,
        context_ids=start_ids or [token for token in (bos, eos) if token is not None][:1],
        end_id=after[-1] if after else _end_id(model, tokenizer),
        stop_ids=stop_ids,
    )


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text: the tokenizer's, then those of the model's `generation_config`."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *_configured_stop_ids(model)]))


def suppressed_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that are never generated: those of `generation_config`, and the padding of our models.

    The padding of a model that was trained by commit 461afef is its end token, which is not suppressed.
    """
    suppressed = list(getattr(model.generation_config, "suppress_tokens", None) or [])
    pad = tokenizer.pad_token_id
    if _is_own(model) and pad is not None and pad not in stop_token_ids(model, tokenizer):
        suppressed.append(pad)
    return list(dict.fromkeys(suppressed))


def _is_own(model: PreTrainedModel) -> bool:
    return model.config.model_type == TinyStoriesConfig.model_type


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after each text."""
    for probe in _PROBES:
        plain = tokenizer(probe, add_special_tokens=False).input_ids
        full = tokenizer(probe).input_ids
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
    return [], []


def _end_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the eos token, unless `generation_config` lists only other special tokens: then the first."""
    configured = _configured_stop_ids(model)
    special = [token for token in configured if token in tokenizer.added_tokens_decoder]
    if tokenizer.eos_token_id in configured or not special:
        return tokenizer.eos_token_id
    return special[0]


def _configured_stop_ids(model: PreTrainedModel) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        return []
    return [configured] if isinstance(configured, int) else list(configured)
