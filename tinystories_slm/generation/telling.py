"""Prompts to stories: in batches, or one as it is written."""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tinystories_slm.errors import InputError
from tinystories_slm.generation.decoding import Decoding, choose_decoding, decode
from tinystories_slm.generation.sampling import Sampling
from tinystories_slm.generation.sentences import end_of_last_sentence
from tinystories_slm.model import TinyStoriesConfig


@dataclass(frozen=True)
class Beginning:
    """A prompt made ready for a model."""

    prompt: str
    seed: int
    token_ids: list[int]
    """With the token that a text of this model starts with."""
    budget: int
    """Tokens that may follow: `max_new_tokens`, or what the prompt leaves of the context."""


@dataclass(frozen=True)
class Story:
    """A story told."""

    prompt: str
    seed: int
    """With the model, the prompt and the settings, what tells this very story again."""
    text: str
    """The prompt and what follows."""
    num_new_tokens: int
    """Tokens drawn, the end token not counted, those that `finish_sentence` cut off counted."""
    finished: bool
    """Whether the model ended it, and not the budget."""


def generate_stories(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    decoding: Decoding = "auto",
) -> list[str]:
    """Each prompt with its continuation, up to `<|endoftext|>` or `max_new_tokens`, told in one batch.

    A story never outgrows the model's context: what its prompt leaves of it bounds `max_new_tokens`.
    Story i is told with seed + i, by itself: neither the others nor the batch change it. The caller's
    random state is left as it was. See `Sampling` for the knobs, `Decoding` for the loops.

    Raises:
        InputError: a setting outside its range, or a prompt that fills the context.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    first = secrets.randbelow(2**31) if seed is None else seed
    beginnings = begin(model, tokenizer, prompts, range(first, first + len(prompts)), sampling)
    told = tell_stories(
        model, tokenizer, beginnings, sampling, batch_size=max(1, len(prompts)), decoding=decoding
    )
    return [story.text for story in told]


def begin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
) -> list[Beginning]:
    """Each prompt with its seed, its token ids, and the tokens that may follow it.

    Raises:
        InputError: a prompt fills the model's context.
    """
    context = context_length(model)
    beginnings = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        ids = prompt_token_ids(model, tokenizer, prompt)
        room = sampling.max_new_tokens if context is None else context - len(ids)
        if room < 1:
            start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
            raise InputError(
                f"the prompt is {len(ids)} tokens long and the model's context is {context}; "
                f"shorten the prompt {start!r}"
            )
        beginnings.append(Beginning(prompt, seed, ids, min(sampling.max_new_tokens, room)))
    return beginnings


def tell_stories(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: Sequence[Beginning],
    sampling: Sampling,
    *,
    batch_size: int,
    finish_sentence: bool = False,
    decoding: Decoding = "auto",
) -> Iterator[Story]:
    """Tell `batch_size` stories at once; they come in the order of `beginnings`, each as soon as it can.

    With `finish_sentence` a story that the budget ended is cut after its last full sentence, where one
    ends behind the prompt.
    """
    end_ids = _end_ids(model, tokenizer)
    way, _ = choose_decoding(model, decoding)
    if beginnings and way != "plain":
        told, following = {}, 0
        ended = _decode(model, tokenizer, beginnings, sampling, end_ids, batch_size=batch_size, way=way)
        for number, new_ids in ended:
            told[number] = new_ids
            while following in told:
                beginning, row = beginnings[following], told.pop(following)
                following += 1
                yield _story(tokenizer, beginning, row, end_ids, finish_sentence)
        return
    for batch in _batches(beginnings, batch_size):
        output_ids = _generate(model, tokenizer, batch, sampling, end_ids)
        for beginning, row in zip(batch, output_ids.tolist(), strict=True):
            yield _story(tokenizer, beginning, row, end_ids, finish_sentence)


class StoryStream:
    """Iterate over it for the pieces of one story's text as they are written; `.story` is then the whole.

    The pieces together are `.story.text`, which is what `tell_stories` tells of the same beginning. No
    piece cuts a character. With `finish_sentence` pieces are whole sentences. A consumer that stops early
    stops the model within a token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        beginning: Beginning,
        sampling: Sampling,
        *,
        finish_sentence: bool = False,
        decoding: Decoding = "auto",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.way, _ = choose_decoding(model, decoding)
        self.beginning, self.sampling, self.finish_sentence = beginning, sampling, finish_sentence
        self.story: Story | None = None

    def __iter__(self) -> Iterator[str]:
        end_ids = _end_ids(self.model, self.tokenizer)
        streamer = _PieceStreamer(self.tokenizer, end_ids)
        listener_left = threading.Event()
        writer = threading.Thread(target=self._write, args=(streamer, listener_left, end_ids), daemon=True)
        self.failure: BaseException | None = None
        prompt_length = len(self.tokenizer.decode(self.beginning.token_ids, skip_special_tokens=True))
        text, shown = "", 0
        writer.start()
        try:
            for piece in streamer:
                text += piece
                sure = len(text)
                if self.finish_sentence:
                    sure = max(min(prompt_length, sure), end_of_last_sentence(text, certain=True))
                if sure > shown:
                    yield text[shown:sure]
                    shown = sure
        finally:
            listener_left.set()
            writer.join()
        if self.failure is not None:
            raise self.failure
        if rest := self.story.text[shown:]:
            yield rest

    def _write(
        self, streamer: TextIteratorStreamer, listener_left: threading.Event, end_ids: list[int]
    ) -> None:
        tell = self._tell_plain if self.way == "plain" else self._tell
        try:
            row = tell(streamer, listener_left, end_ids)
            self.story = _story(self.tokenizer, self.beginning, row, end_ids, self.finish_sentence)
        except BaseException as error:  # to be raised where the pieces are read
            self.failure = error
        streamer.end()

    def _tell(
        self, streamer: TextIteratorStreamer, listener_left: threading.Event, end_ids: list[int]
    ) -> list[int]:
        row: list[int] = []

        def hear(token: int) -> None:
            row.append(token)
            streamer.put(torch.tensor([token]))
            if listener_left.is_set():
                raise _ListenerLeft

        ended = _decode(
            self.model, self.tokenizer, [self.beginning], self.sampling, end_ids,
            batch_size=1, way=self.way, on_token=hear, streamer=streamer,
        )  # fmt: skip
        with suppress(_ListenerLeft):
            list(ended)
        return row

    def _tell_plain(
        self, streamer: TextIteratorStreamer, listener_left: threading.Event, end_ids: list[int]
    ) -> list[int]:
        [row] = _generate(
            self.model,
            self.tokenizer,
            [self.beginning],
            self.sampling,
            end_ids,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Left(listener_left)]),
        ).tolist()
        return row


class _ListenerLeft(Exception):
    """Nobody reads the pieces any more."""


class _PieceStreamer(TextIteratorStreamer):
    """Hands on whole words, as its parent does, but decodes the story from its start each time.

    The parent forgets what was before a line break, and then a tokenizer as Llama's, which drops the blank
    that a text starts with, drops the one behind the break. Nor is an end token part of the story, which a
    tokenizer may not know as special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.end_ids = end_ids

    def put(self, value: Tensor) -> None:
        ids = value.flatten().tolist()
        is_prompt = not self.token_cache
        self.token_cache.extend(ids if is_prompt else [token for token in ids if token not in self.end_ids])
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        end = max(text.rfind(" "), text.rfind("\n")) + 1
        if text and self._is_chinese_char(ord(text[-1])):  # written without blanks
            end = len(text)
        if end > self.print_len:
            self.on_finalized_text(text[self.print_len : end])
            self.print_len = end


class _Left(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that prompt and story may have together; None where the configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prompt_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's ids as a text of this model begins, never empty.

    Stories of our training follow the end token. Of other models a tokenizer knows best and adds what they
    start with itself; but where one token is both beginning and end, as GPT-2's `<|endoftext|>`, it
    separates texts and is left out by the tokenizer.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ours = model.config.model_type == TinyStoriesConfig.model_type
    # Its warning of a long text is our error.
    ids = tokenizer(prompt, add_special_tokens=not ours, verbose=False).input_ids
    if prompt and len(ids) > 1 and ids[-1] == eos and not ours:
        ids = ids[:-1]  # some tokenizers end every text
    separator = eos if ours or bos == eos else None
    if separator is not None and ids[:1] != [separator]:
        ids = [separator, *ids]
    return ids or [bos if bos is not None else eos]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: the tokenizer's, and what the model's generation defaults name."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys([tokenizer.eos_token_id, *named]))


def _batches(beginnings: Sequence[Beginning], batch_size: int) -> Iterator[list[Beginning]]:
    """Neighbours, as many as may be: of one length, or of lengths that leave each its whole budget.

    A batch goes on for as long as its longest prompt has room; that must shorten nobody's story.
    """
    batch: list[Beginning] = []
    for beginning in beginnings:
        lengths = {len(one.token_ids) for one in [*batch, beginning]}
        budgets = {one.budget for one in [*batch, beginning]}
        if batch and (len(batch) == batch_size or (len(lengths) > 1 and len(budgets) > 1)):
            yield batch
            batch = []
        batch.append(beginning)
    if batch:
        yield batch


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Beginning],
    sampling: Sampling,
    end_ids: list[int],
    **options: object,
) -> Tensor:
    """The new token ids, (len(batch), at most their budget), filled up after an end token."""
    prompts = _padded(model, tokenizer, batch, end_ids)
    longest = prompts["input_ids"].shape[1]
    # Greedy, as the processors' dice have been cast when it takes the largest score.
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=batch[0].budget,
        eos_token_id=end_ids,
        pad_token_id=_pad_id(tokenizer, end_ids),
    )
    with _evaluating(model, settings), torch.no_grad():
        output_ids = model.generate(
            **prompts,
            logits_processor=sampling.processors([one.seed for one in batch], longest),
            **options,
        )
    return output_ids[:, longest:]


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: Sequence[Beginning],
    sampling: Sampling,
    end_ids: list[int],
    *,
    batch_size: int,
    way: Decoding,
    on_token: Callable[[int], None] | None = None,
    streamer: TextIteratorStreamer | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(Number of the story, its new token ids), as each ends, from our own loop under `generate()`."""
    loop = partial(
        decode,
        seeds=[one.seed for one in beginnings],
        budgets=[one.budget for one in beginnings],
        sampling=sampling,
        end_ids=end_ids,
        batch_size=batch_size,
        way=way,
        on_token=on_token,
    )
    # What generate() checks is the longest prompt; how many tokens follow each one is the loop's affair.
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(one.budget for one in beginnings),
        eos_token_id=end_ids,
        pad_token_id=_pad_id(tokenizer, end_ids),
    )
    with _evaluating(model, settings):
        return model.generate(
            **_padded(model, tokenizer, beginnings, end_ids), custom_generate=loop, streamer=streamer
        )


def _padded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: Sequence[Beginning],
    end_ids: list[int],
) -> dict[str, Tensor]:
    """input_ids and attention_mask, both (stories, longest prompt): padded on the left, so that every
    continuation starts right after its prompt."""
    longest = max(len(one.token_ids) for one in beginnings)
    pads = [longest - len(one.token_ids) for one in beginnings]
    pad_id = _pad_id(tokenizer, end_ids)
    rows = [[pad_id] * pad + one.token_ids for pad, one in zip(pads, beginnings, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    return {
        "input_ids": torch.tensor(rows, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }


def _pad_id(tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]


@contextmanager
def _evaluating(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """The model without dropout, and with `settings` alone: a model's own defaults (beams, penalties, another
    temperature) would mix with them."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


def _story(
    tokenizer: PreTrainedTokenizerBase,
    beginning: Beginning,
    new_ids: list[int],
    end_ids: list[int],
    finish_sentence: bool,
) -> Story:
    ended_at = next((at for at, token in enumerate(new_ids) if token in end_ids), None)
    new_ids = new_ids[:ended_at]
    text = tokenizer.decode(beginning.token_ids + new_ids, skip_special_tokens=True)
    if finish_sentence and ended_at is None:
        end = end_of_last_sentence(text)
        if end > len(tokenizer.decode(beginning.token_ids, skip_special_tokens=True)):
            text = text[:end]
    return Story(beginning.prompt, beginning.seed, text, len(new_ids), ended_at is not None)
