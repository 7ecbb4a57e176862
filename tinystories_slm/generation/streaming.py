"""Generate one text and yield its pieces while the model generates."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tinystories_slm.config.command_args.generate import Backend
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.generation.decoder import resolve_backend
from tinystories_slm.generation.engine import run_decoder, run_hf
from tinystories_slm.generation.request import (
    GenerationRequest,
    GenerationResult,
    make_result,
)
from tinystories_slm.generation.sentences import end_of_last_sentence
from tinystories_slm.text_boundaries import stop_token_ids


class TextStream:
    """Iterable over the text of one request, in pieces; the end of the iteration sets `result` and `new_ids`.

    `new_ids` are the sampled token ids, with the stop token if there is one.
    The joined pieces equal `result.text`, the text that `generate_batch` returns for the same request. No
    piece splits a character. With `finish_sentence`, the pieces after the prompt are whole sentences. If the
    consumer stops early, generation stops within one token. The iterator raises the errors of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        request: GenerationRequest,
        sampling: SamplingParams,
        *,
        finish_sentence: bool = False,
        backend: Backend = "auto",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.backend, _ = resolve_backend(model, backend)
        self.request, self.sampling, self.finish_sentence = request, sampling, finish_sentence
        self.result: GenerationResult | None = None
        self.new_ids: list[int] = []
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        stop_ids = stop_token_ids(self.model, self.tokenizer)
        streamer = _IncrementalDetokenizer(self.tokenizer, stop_ids)
        cancelled = threading.Event()
        worker = threading.Thread(target=self._generate, args=(streamer, cancelled, stop_ids), daemon=True)
        self._error = None
        prompt_length = len(self.tokenizer.decode(self.request.token_ids, skip_special_tokens=True))
        text, num_yielded = "", 0
        worker.start()
        try:
            for piece in streamer:
                text += piece
                end = len(text)
                if self.finish_sentence:
                    end = max(min(prompt_length, end), end_of_last_sentence(text, confirmed_only=True))
                if end > num_yielded:
                    yield text[num_yielded:end]
                    num_yielded = end
        finally:
            cancelled.set()
            worker.join()
        if self._error is not None:
            raise self._error
        if rest := self.result.text[num_yielded:]:
            yield rest

    def _generate(
        self, streamer: TextIteratorStreamer, cancelled: threading.Event, stop_ids: list[int]
    ) -> None:
        """Run the backend in the worker thread; set `result`, or `_error` for the consumer to raise."""
        run = self._run_hf if self.backend == "hf" else self._run_decoder
        try:
            new_ids = run(streamer, cancelled, stop_ids)
            self.new_ids = new_ids
            self.result = make_result(
                self.tokenizer, self.request, new_ids, stop_ids, finish_sentence=self.finish_sentence
            )
        except BaseException as error:
            self._error = error
        streamer.end()

    def _run_decoder(
        self, streamer: TextIteratorStreamer, cancelled: threading.Event, stop_ids: list[int]
    ) -> list[int]:
        new_ids: list[int] = []

        def on_token(token: int) -> None:
            new_ids.append(token)
            streamer.put(torch.tensor([token]))
            if cancelled.is_set():
                raise _Cancelled

        finished = run_decoder(
            self.model, self.tokenizer, [self.request], self.sampling, stop_ids,
            batch_size=1, backend=self.backend, on_token=on_token, streamer=streamer,
        )  # fmt: skip
        with suppress(_Cancelled):
            list(finished)
        return new_ids

    def _run_hf(
        self, streamer: TextIteratorStreamer, cancelled: threading.Event, stop_ids: list[int]
    ) -> list[int]:
        [new_ids] = run_hf(
            self.model,
            self.tokenizer,
            [self.request],
            self.sampling,
            stop_ids,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_CancelCriteria(cancelled)]),
        ).tolist()
        return new_ids


class _Cancelled(Exception):
    """The consumer stopped reading the stream."""


class _IncrementalDetokenizer(TextIteratorStreamer):
    """A `TextIteratorStreamer` that decodes the whole text after each token and emits whole words.

    The parent class drops its tokens at each line break. A tokenizer such as Llama's, which removes the
    blank at the start of a text, then removes the blank after the line break too. This class also skips the
    stop tokens that the tokenizer does not list as special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stop_ids = stop_ids

    def put(self, value: Tensor) -> None:
        ids = value.flatten().tolist()
        is_prompt = not self.token_cache
        self.token_cache.extend(ids if is_prompt else [token for token in ids if token not in self.stop_ids])
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        end = max(text.rfind(" "), text.rfind("\n")) + 1
        if text and self._is_chinese_char(ord(text[-1])):  # Chinese text has no blanks between words
            end = len(text)
        if end > self.print_len:
            self.on_finalized_text(text[self.print_len : end])
            self.print_len = end


class _CancelCriteria(StoppingCriteria):
    """Stop transformers' loop after the consumer stopped reading."""

    def __init__(self, cancelled: threading.Event) -> None:
        self.cancelled = cancelled

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.cancelled.is_set(), device=input_ids.device)
