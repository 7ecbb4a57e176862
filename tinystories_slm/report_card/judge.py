"""Judges: their interface, and a model behind an OpenAI-compatible endpoint."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from urllib.parse import urlsplit

from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.data.sources.file_formats import first_line
from tinystories_slm.errors import UserError
from tinystories_slm.report_card.judge_prompts import JudgeRequest

# The client waits longer after each failure, or as long as the server states.
_MAX_RETRIES = 8
_MAX_TOKENS = 512
TEMPERATURE = 1.0
"""The only one that every endpoint accepts; repeated judgments differ where the judge is unsure."""


class JudgeError(UserError):
    """The endpoint gives no answer; those received so far are kept."""


class Judge(ABC):
    """A model that answers messages."""

    name: str
    """Identifies the judge in the cache and on the page; without credentials."""
    max_concurrency: int
    """Calls at the same time."""
    batch_size = 1
    """Requests of one call."""
    is_remote = True
    """Whether the rate of requests is limited."""

    @abstractmethod
    def answer(self, batch: Sequence[JudgeRequest]) -> list[str]:
        """Return the text of each answer; empty if the response has none.

        Raises:
            JudgeError: there is no answer after all retries.
        """


class EndpointJudge(Judge):
    """A model of an OpenAI-compatible endpoint, with the key of an environment variable."""

    def __init__(self, args: ReportCardArgs) -> None:
        from openai import OpenAI

        self.name = f"{args.judge} at {_public_url(args.judge_url)}"
        self.max_concurrency = args.judge_concurrency
        self._model = args.judge
        self._client = OpenAI(
            base_url=args.judge_url,
            api_key=os.environ.get(args.judge_key_env) or "none",  # local servers need no key
            max_retries=_MAX_RETRIES,
            timeout=args.judge_timeout_s,
        )

    def answer(self, batch: Sequence[JudgeRequest]) -> list[str]:
        return [self._answer_one(request) for request in batch]

    def _answer_one(self, request: JudgeRequest) -> str:
        from openai import APIConnectionError, APIError, APIStatusError

        try:
            response = self._client.chat.completions.create(
                model=self._model,
                messages=list(request.messages),
                max_tokens=_MAX_TOKENS,
                temperature=TEMPERATURE,
                seed=request.seed,
            )
        except APIStatusError as error:
            raise JudgeError(
                f"{self.name}: status {error.status_code} ({first_line(error)[:200]})"
            ) from error
        except APIConnectionError as error:
            raise JudgeError(f"{self.name}: no answer ({first_line(error)[:200]})") from error
        except (APIError, json.JSONDecodeError):
            return ""  # a response that is not of the interface was sent, and may have been paid for
        choices = getattr(response, "choices", None)
        text = getattr(getattr(choices[0], "message", None), "content", None) if choices else None
        return text if isinstance(text, str) else ""


def _public_url(url: str) -> str:
    """Return host and path of a URL, which has no credentials (`ReportCardArgs`)."""
    parts = urlsplit(url)
    return f"{parts.netloc}{parts.path.rstrip('/')}"
