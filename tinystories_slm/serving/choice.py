"""A completion that is being generated: its tokens become pieces of text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinystories_slm.generation.detokenizer import IncrementalDetokenizer
from tinystories_slm.generation.request import FinishReason
from tinystories_slm.generation.sampling import TokenLogprobs
from tinystories_slm.generation.slot_batch import ActiveSequence
from tinystories_slm.serving.stop_strings import StopStrings


@dataclass(frozen=True)
class ScoredToken:
    """A token with its log-probabilities and the place of its text."""

    token: int
    logprobs: TokenLogprobs | None
    """None for the first token of a prompt, which has no tokens before it."""
    offset: int
    """Characters of the choice's text before the token."""


@dataclass(frozen=True)
class Piece:
    """A part of a choice's text."""

    choice: "Choice"
    text: str
    tokens: list[ScoredToken]
    """The tokens of this part, if the request has `logprobs`."""
    finish_reason: FinishReason | None
    """None until the last part."""


@dataclass(eq=False, kw_only=True)
class Choice(ActiveSequence):
    """One completion of a request, in the words of OpenAI's interface."""

    detokenizer: IncrementalDetokenizer
    stops: StopStrings
    stop_ids: Sequence[int]
    emit: Callable[["Piece | Exception"], None]
    """Called in the event loop with each part, or with the error that ends the generation."""
    echo: str = ""
    """Text before the first part: the prompt, if the request has `echo`."""
    prompt_offsets: list[int] | None = None
    """Characters of `echo` before each token of the prompt, if these are scored, too."""
    is_cancelled: bool = False
    """Set by the event loop when the client is gone."""
    finish_reason: FinishReason | None = None
    num_characters: int = 0
    prompt_tokens: list[ScoredToken] = field(default_factory=list)

    @property
    def num_completion_tokens(self) -> int:
        """Number of new tokens without the stop token."""
        return len(self.new_ids) - (bool(self.new_ids) and self.new_ids[-1] in self.stop_ids)

    def take(self, token: int) -> Piece:
        """Return the part of the text that the newly sampled `token` completes."""
        is_first = len(self.new_ids) == 1
        tokens = list(self.prompt_tokens) if is_first else []
        if is_first:
            self.num_characters = len(self.echo)
        if token in self.stop_ids:
            text = self._end("", "stop")
        else:
            if self.num_top_logprobs is not None:
                tokens.append(ScoredToken(token, self.logprobs[-1], self.num_characters))
            decoded = self.detokenizer.add(token)
            self.num_characters += len(decoded)
            text, has_stopped = self.stops.add(decoded)
            if has_stopped:
                self.finish_reason = "stop"
            elif self.remaining == 0:
                text = self._end(text, "length")
        return Piece(self, self.echo + text if is_first else text, tokens, self.finish_reason)

    def _end(self, text: str, reason: FinishReason) -> str:
        """Return `text` and what was held back; set the finish reason."""
        rest, has_stopped = self.stops.add(self.detokenizer.flush())
        self.finish_reason = "stop" if has_stopped else reason
        return text + rest + self.stops.flush()
