"""The quickstart command: prepare data, train, evaluate, and generate a text with the new model."""

import json
import logging
import secrets
import shlex
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.commands.generate import write_results
from tinystories_slm.commands.source_folders import use_own_folders
from tinystories_slm.config import RunConfig
from tinystories_slm.data.provenance import BUILTIN
from tinystories_slm.data.sources import iter_raw_stories
from tinystories_slm.evaluation.evaluate import format_scores, score_texts
from tinystories_slm.generation import SamplingParams, generate_batch, generate_texts, prepare_requests
from tinystories_slm.generation.prompts import DEFAULT_PROMPT
from tinystories_slm.hub.card import write_card
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training import is_finished, train, write_report

logger = logging.getLogger(__name__)

# Low: after minutes of training, only the most probable tokens of the model are reliable.
TEMPERATURE = 0.3
_EVAL_STORIES = 1000
_NUM_SAMPLES = 3


def run_quickstart(config: RunConfig) -> str:
    """Train and evaluate the model of `config`, print a summary with a new text, and return the text.

    A finished run is not trained again, and an evaluated run is not evaluated again.

    Raises:
        UserError: a step rejects its input.
    """
    config = use_own_folders(config)
    if not is_finished(config):
        train(config)
    run_dir = RunDir(config.output_dir)
    model, tokenizer = load_model_folder(str(run_dir.best))
    if not run_dir.evaluation.exists():
        logger.info("evaluating %s on at most %d validation stories", run_dir.best, _EVAL_STORIES)
        texts = list(islice(iter_raw_stories(config.data.data_dir, "validation"), _EVAL_STORIES))
        report = score_texts(
            model,
            tokenizer,
            texts,
            batch_size=32,
            is_builtin_corpus=config.data.source == BUILTIN,
            progress=True,
        )
        run_dir.evaluation.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _write_card_samples(model, tokenizer, run_dir)
        write_card(config.output_dir)
        write_report(config.output_dir)  # training wrote it without the evaluation
    report = run_dir.read_evaluation()
    seed = secrets.randbelow(10_000)
    [text] = generate_texts(model, tokenizer, [DEFAULT_PROMPT], temperature=TEMPERATURE, seed=seed)
    print(_format_summary(text, report, config, seed))
    return text


def _write_card_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: RunDir) -> None:
    """Write stories.jsonl in the run directory: the completions with the seeds 0, 1, 2, not hand-picked."""
    sampling = SamplingParams(temperature=TEMPERATURE)
    prompts = [DEFAULT_PROMPT] * _NUM_SAMPLES
    requests = prepare_requests(model, tokenizer, prompts, range(_NUM_SAMPLES), sampling)
    results = generate_batch(model, tokenizer, requests, sampling, batch_size=_NUM_SAMPLES)
    # A relative model path: the file is published, and an absolute path describes this machine.
    write_results(run_dir.stories, results, f"{run_dir.path.name}/best", sampling)


def _format_summary(text: str, report: dict[str, Any], config: RunConfig, seed: int) -> str:
    """Return the summary that a run prints: generated text, metrics, files and next commands."""
    rule, run_dir = "-" * 78, config.output_dir
    again = "make story" + (
        "" if config.data.source == BUILTIN else f" DATA={shlex.quote(config.data.source)}"
    )
    generate = f"python scripts/generate.py --model {run_dir}/best"
    return f"""
{rule}
{text}
{rule}
{format_scores(report)}

run directory  {run_dir}: best/ is the model, report.html the report on one page,
               samples.md the text samples of training, metrics.jsonl the metrics, config.yaml the options
next           {again}     generates another text in seconds
               source .venv/bin/activate
               {generate} --temperature {TEMPERATURE} --seed {seed}
               {generate} --prompt "One day, a little fox"
"""
