"""The JSON of responses: completions and chat completions, whole or in parts."""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from tinystories_slm.serving.choice import Choice, Piece, ScoredToken


class JsonResponse(Response):
    """A JSON body in ASCII, which also holds the half of a surrogate pair that a request may contain."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class CompletionFormat:
    """Responses of `/v1/completions`."""

    whole = part = "text_completion"
    prefix = "cmpl"

    def __init__(self, model_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}"}
        self._tail = {"created": int(time.time()), "model": model_name}

    def response(self, pieces: Iterable[Piece], choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        bodies = [self._choice(piece, self._text(piece)) for piece in merge_pieces(pieces)]
        return {**self._head, "object": self.whole, **self._tail, "choices": bodies, "usage": usage(choices)}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return a part of a streamed response."""
        choice = self._choice(piece, self._text_of_part(piece))
        return {**self._head, "object": self.part, **self._tail, "choices": [choice]}

    def first_chunks(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """Return the parts that come before the text."""
        return []

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the last part of a streamed response with `include_usage`."""
        return {**self._head, "object": self.part, **self._tail, "choices": [], "usage": usage(choices)}

    def _choice(self, piece: Piece, text: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": piece.choice.index,
            **text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _text(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _text_of_part(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if piece.choice.num_top_logprobs is None:
            return None
        return {
            "tokens": [self._token_text(scored.token) for scored in piece.tokens],
            "token_logprobs": [scored.logprobs and scored.logprobs.logprob for scored in piece.tokens],
            "top_logprobs": [self._top_logprobs(scored) for scored in piece.tokens],
            "text_offset": [scored.offset for scored in piece.tokens],
        }

    def _top_logprobs(self, scored: ScoredToken) -> dict[str, float] | None:
        if scored.logprobs is None:
            return None
        return {self._token_text(token): logprob for token, logprob in scored.logprobs.top}

    def _token_text(self, token: int) -> str:
        """Return the text of a token; its entry in the vocabulary if it holds a part of a character."""
        text = self._tokenizer.decode([token])
        return self._tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text


class ChatFormat(CompletionFormat):
    """Responses of `/v1/chat/completions`."""

    whole, part = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def first_chunks(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        pieces = [Piece(choice, "", [], None) for choice in choices]
        return [self.chunk(piece) | {"choices": [self._choice(piece, delta)]} for piece in pieces]

    def _text(self, piece: Piece) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": piece.text}}

    def _text_of_part(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text else {}}


def merge_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Join the pieces of each choice; return one per choice, in the order of the choices."""
    of_choice: dict[Choice, list[Piece]] = {}
    for piece in pieces:
        of_choice.setdefault(piece.choice, []).append(piece)
    return [
        Piece(
            choice,
            "".join(part.text for part in parts),
            [token for part in parts for token in part.tokens],
            parts[-1].finish_reason,
        )
        for choice, parts in sorted(of_choice.items(), key=lambda item: item[0].index)
    ]


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Return the numbers of tokens; a prompt counts once for all of its choices, stop tokens do not count."""
    prompts = {id(choice.prompt): len(choice.prompt) for choice in choices}
    prompt_tokens = sum(prompts.values())
    completion_tokens = sum(choice.num_completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def server_sent_event(body: object) -> bytes:
    """Return an event of a stream; `[DONE]` is sent as it is."""
    data = body if isinstance(body, str) else json.dumps(body)
    return f"data: {data}\n\n".encode()
