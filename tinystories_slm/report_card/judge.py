"""Judges: a model behind an OpenAI-compatible endpoint, or a local model."""

import json
import os
from abc import ABC, abstractmethod
from urllib.parse import urlsplit

from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.errors import UserError
from tinystories_slm.generation import generate_batch, prepare_requests
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.report_card.judge_prompts import Message

# The client waits longer after each failure, or as long as the server states.
_MAX_RETRIES = 8
_MAX_TOKENS = 512
# The only temperature that every endpoint accepts; repeated judgments differ where the judge is unsure.
_TEMPERATURE = 1.0


class JudgeError(UserError):
    """The endpoint gives no answer; those received so far are kept."""


class Judge(ABC):
    """A model that answers messages."""

    name: str
    """Identifies the judge in the cache and on the page; without credentials."""
    max_concurrency: int

    @abstractmethod
    def answer(self, messages: list[Message], seed: int) -> str:
        """Return the text of the answer; empty if the response has none.

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

    def answer(self, messages: list[Message], seed: int) -> str:
        from openai import APIConnectionError, APIError, APIStatusError

        try:
            response = self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                max_tokens=_MAX_TOKENS,
                temperature=_TEMPERATURE,
                seed=seed,
            )
        except APIStatusError as error:
            raise JudgeError(f"{self.name}: status {error.status_code} ({_first_line(error)})") from error
        except APIConnectionError as error:
            raise JudgeError(f"{self.name}: no answer ({_first_line(error)})") from error
        except (APIError, json.JSONDecodeError):
            return ""  # a response that is not of the interface was sent, and may have been paid for
        choices = getattr(response, "choices", None)
        text = getattr(getattr(choices[0], "message", None), "content", None) if choices else None
        return text if isinstance(text, str) else ""


class LocalJudge(Judge):
    """A causal language model of a folder or of the Hub; its chat template is used if it has one."""

    max_concurrency = 1

    def __init__(self, args: ReportCardArgs) -> None:
        self.name = args.judge
        self._model, self._tokenizer = load_model_folder(
            args.judge, trust_remote_code=args.trust_remote_code, device=args.device
        )

    def answer(self, messages: list[Message], seed: int) -> str:
        if self._tokenizer.chat_template:
            prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "\n\n".join(message["content"] for message in messages) + "\n"
        sampling = SamplingParams(max_new_tokens=_MAX_TOKENS, temperature=_TEMPERATURE, top_k=0, top_p=1.0)
        try:
            requests = prepare_requests(self._model, self._tokenizer, [prompt], [seed], sampling)
        except UserError as error:
            raise JudgeError(f"{self.name}: {error}; use a judge with a longer context") from error
        [result] = generate_batch(self._model, self._tokenizer, requests, sampling, batch_size=1)
        # The prompt is decoded, too, and special tokens of the template are left out of the text.
        decoded = self._tokenizer.decode(requests[0].token_ids, skip_special_tokens=True)
        return result.text[len(decoded) :]


def load_judge(args: ReportCardArgs) -> Judge:
    """Return the judge of `args`.

    Raises:
        UserError: the local model cannot be loaded.
    """
    return LocalJudge(args) if args.judge_url is None else EndpointJudge(args)


def _public_url(url: str) -> str:
    """Return host and path of a URL, which has no credentials (`ReportCardArgs`)."""
    parts = urlsplit(url)
    return f"{parts.netloc}{parts.path.rstrip('/')}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
