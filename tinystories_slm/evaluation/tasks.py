"""Evaluation tasks beside the loss: measurements of generated stories, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm import grammar
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.data.instruct import parse_block
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.instruct import measure_prompts
from tinystories_slm.generation.engine import generate_batch
from tinystories_slm.generation.prompts import default_prompt
from tinystories_slm.generation.request import GenerationResult, prepare_requests


@dataclass(frozen=True)
class EvalResult:
    """One measured value."""

    name: str
    """Key in metrics.jsonl (`val/NAME`) and in the output of `evaluate`."""
    value: float
    unit: str
    """Unit of `value`, such as `share of stories`."""
    count: int
    """Number of items that `value` is the mean over."""

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.4g} {self.unit} ({self.count})"


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """Inputs of a task: the model in evaluation mode, and stories that it generates once for all tasks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 256
    seed: int = 0
    """Story i is generated with seed + i."""
    num_stories: int = 16
    held_out: Sequence[str] = ()
    """Stories of the data that the model was not trained on."""

    @cached_property
    def stories(self) -> list[GenerationResult]:
        """Stories from the default prompt, at the default sampling parameters."""
        sampling = SamplingParams(max_new_tokens=self.max_new_tokens)
        seeds = range(self.seed, self.seed + self.num_stories)
        prompts = [default_prompt(self.tokenizer)] * self.num_stories
        requests = prepare_requests(self.model, self.tokenizer, prompts, seeds, sampling)
        return list(
            generate_batch(self.model, self.tokenizer, requests, sampling, batch_size=self.num_stories)
        )


EvalTask = Callable[[EvalContext], list[EvalResult]]


def _measure_ends(context: EvalContext) -> list[EvalResult]:
    """Return the share of stories that end with the end-of-text token instead of the length limit."""
    ended = [story.finish_reason == "stop" for story in context.stories]
    return [EvalResult("ended", sum(ended) / len(ended), "share of stories", len(ended))]


def _measure_grammar(context: EvalContext) -> list[EvalResult]:
    """Return the share of stories that the grammar of the built-in corpus accepts."""
    accepted = [_is_accepted(story.text) for story in context.stories]
    return [EvalResult("grammar", sum(accepted) / len(accepted), "share of stories", len(accepted))]


def _is_accepted(text: str) -> bool:
    block = parse_block(text)
    try:
        grammar.log_prob(text if block is None else block.story)
    except ValueError:
        return False
    return True


def _measure_instruct(context: EvalContext) -> list[EvalResult]:
    """Return how far stories for held-out prompts follow them, and how far the real stories do."""
    shares = measure_prompts(context.model, context.tokenizer, context.held_out, seed=context.seed)
    return [EvalResult(f"instruct_{share.name}", *share[1:]) for share in shares]


EVAL_TASKS: dict[str, EvalTask] = {
    "ended": _measure_ends,
    "grammar": _measure_grammar,
    "instruct": _measure_instruct,
}
"""Tasks by the name in `train.eval_tasks` and `evaluate --tasks`; docs/extending.md adds one."""


def parse_task_names(text: str | None, option: str) -> list[str]:
    """Return the names in a comma-separated list; `option` is the option that holds it.

    Raises:
        UserError: there is no task of one of the names.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in EVAL_TASKS:
            raise UserError(f"{option} ({name}): must be among {', '.join(EVAL_TASKS)}")
    return names


def run_tasks(names: list[str], context: EvalContext) -> list[EvalResult]:
    """Run the tasks in order and return their results."""
    return [result for name in names for result in EVAL_TASKS[name](context)]
