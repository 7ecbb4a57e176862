"""A local model as judge, from a folder, a GGUF file or the Hub; it can give no malformed answer."""

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.data.sources.file_formats import first_line
from tinystories_slm.generation import prepare_requests
from tinystories_slm.generation.engine import run_hf
from tinystories_slm.generation.request import PromptTooLongError, context_length
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.model_folder import load_model_folder, resolve_model, weights_sha256
from tinystories_slm.report_card.display_names import display_names
from tinystories_slm.report_card.judge import TEMPERATURE, Judge, JudgeError
from tinystories_slm.report_card.judge_prompts import AnswerForm, JudgeRequest, Message
from tinystories_slm.text_boundaries import stop_token_ids


class LocalJudge(Judge):
    """A causal language model; its chat template is used if it has one.

    The model samples only tokens that continue an answer of the required form: small models seldom write one
    by themselves.
    """

    max_concurrency = 1
    is_remote = False

    def __init__(self, args: ReportCardArgs) -> None:
        self._model, self._tokenizer = load_model_folder(
            args.judge, trust_remote_code=args.trust_remote_code, device=args.device
        )
        [name] = display_names([args.judge], option="judge")
        weights = weights_sha256(expand_user(resolve_model(args.judge).name))
        version = (weights or getattr(self._model.config, "_commit_hash", None) or "")[:12]
        self.name = f"{name} ({version})" if version else name
        self.batch_size = args.judge_concurrency
        self._tokens_of = cache(self._tokenize_form)

    def answer(self, batch: Sequence[JudgeRequest]) -> list[str]:
        forms = [self._tokens_of(request.form) for request in batch]
        num_tokens = max(form.max_tokens for form in forms)
        sampling = SamplingParams(max_new_tokens=num_tokens, temperature=TEMPERATURE, top_k=0, top_p=1.0)
        prompts, seeds = zip(*[(self._prompt(one.messages), one.seed) for one in batch], strict=True)
        too_long = JudgeError(
            f"{self.name}: a story does not fit into its context of {context_length(self._model)} tokens; "
            "use a judge with a longer context"
        )
        try:
            requests = prepare_requests(self._model, self._tokenizer, prompts, seeds, sampling)
        except PromptTooLongError as error:
            raise too_long from error
        if any(request.max_new_tokens < num_tokens for request in requests):
            raise too_long
        longest = max(len(request.token_ids) for request in requests)

        def allowed_tokens(row: int, ids: Tensor) -> list[int]:
            return forms[row].allowed_tokens(ids[longest:].tolist())

        stop_ids = stop_token_ids(self._model, self._tokenizer)
        new_ids = run_hf(
            self._model,
            self._tokenizer,
            requests,
            sampling,
            stop_ids,
            prefix_allowed_tokens_fn=allowed_tokens,
        )
        return [form.text(ids) for form, ids in zip(forms, new_ids.tolist(), strict=True)]

    def _prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of the messages in the form that the model was trained on.

        A blank in each special token of a message keeps a story from ending its message.
        """
        from jinja2 import TemplateError

        special = [str(one) for one in self._tokenizer.added_tokens_decoder.values() if one.special]
        plain = [{**one, "content": _break_tokens(one["content"], special)} for one in messages]
        joined = "\n\n".join(message["content"] for message in plain)
        if not self._tokenizer.chat_template:
            return f"{joined}\n"
        for chat in (plain, [{"role": "user", "content": joined}]):
            try:
                return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:  # as that of Gemma 2 for the role `system`
                failure = error
        raise JudgeError(f"{self.name}: its chat template fails ({first_line(failure)})") from failure

    def _tokenize_form(self, form: AnswerForm) -> "_TokenForm":
        parts = [
            {text: self._tokenizer(text, add_special_tokens=False).input_ids for text in texts}
            for texts in form
        ]
        return _TokenForm(parts, stop_token_ids(self._model, self._tokenizer)[0])


class _TokenForm:
    """An answer form as token ids."""

    def __init__(self, parts: Sequence[dict[str, list[int]]], stop_id: int) -> None:
        self._parts, self._stop_id = parts, stop_id
        self.max_tokens = sum(max(map(len, texts.values())) for texts in parts) + 1

    def allowed_tokens(self, ids: list[int]) -> list[int]:
        """Return the ids that may follow `ids`, the start of an answer."""
        for texts in self._parts:
            found = next((own for own in texts.values() if ids[: len(own)] == own), None)
            if found is None:
                return sorted({own[len(ids)] for own in texts.values() if own[: len(ids)] == ids})
            ids = ids[len(found) :]
        return [self._stop_id]

    def text(self, ids: list[int]) -> str:
        """Return the text of an answer that ends with a stop token."""
        chosen = []
        for texts in self._parts:
            text = next(text for text, own in texts.items() if ids[: len(own)] == own)
            chosen.append(text)
            ids = ids[len(texts[text]) :]
        return "".join(chosen)


def _break_tokens(text: str, tokens: Sequence[str]) -> str:
    """Return `text` with a blank after the first character of each of `tokens` in it."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
