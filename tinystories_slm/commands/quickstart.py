"""The quickstart command: prepare data, train, evaluate, and generate a text with the new model."""

import logging
import secrets
import shlex
from collections.abc import Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.commands.generate import write_results
from tinystories_slm.commands.source_folders import use_own_folders
from tinystories_slm.commands.story_limit import limit_stories
from tinystories_slm.config import DataArgs, RunConfig
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import PROTOCOL, format_scores, score_texts, write_scores
from tinystories_slm.evaluation.selection import count_training_stories
from tinystories_slm.evaluation.training_data import TrainingData, num_records_of_last_run, read_training_data
from tinystories_slm.generation import SamplingParams, generate_batch, generate_texts, prepare_requests
from tinystories_slm.generation.prompts import default_prompt
from tinystories_slm.hub.card import is_card_current, write_card
from tinystories_slm.model_folder import load_model_folder, weights_sha256
from tinystories_slm.runs.records import is_number
from tinystories_slm.runs.report import is_report_current
from tinystories_slm.runs.run_dir import RunDir, read_json_object
from tinystories_slm.training import is_finished, restore_finished_run, train, write_report
from tinystories_slm.training.checkpoints import check_same_data

logger = logging.getLogger(__name__)

# Low: after minutes of training, only the most probable tokens of the model are reliable.
TEMPERATURE = 0.3
EVAL_STORIES = 1000
_NUM_SAMPLES = 3


def run_quickstart(config: RunConfig) -> str:
    """Train and evaluate the model of `config`, print a summary with a new text, and return the text.

    A finished run is not trained again. Scores, stories, card and report are made again only if they are
    missing or damaged, or not those of the weights in best/.

    Raises:
        UserError: a step rejects its input, or the source of a finished run has changed.
    """
    config = limit_stories(use_own_folders(config))
    if is_finished(config):
        restore_finished_run(config)
    else:
        train(config)
    run_dir = RunDir(config.output_dir)
    model, tokenizer = load_model_folder(str(run_dir.best))
    weights = weights_sha256(run_dir.best)
    trained_on = read_training_data(str(run_dir.best), model.config) or []
    report = _current_evaluation(run_dir, weights, trained_on)
    if report is None:
        report = _evaluate_best(model, tokenizer, config, weights, trained_on)
        write_scores(report, run_dir.evaluation)
    if not any(line.get("weights_sha256") == weights for line in run_dir.read_stories()):
        _write_card_samples(model, tokenizer, run_dir, weights)
    if not is_card_current(config.output_dir):
        write_card(config.output_dir)
    if not is_report_current(config.output_dir):  # training wrote it without the evaluation
        write_report(config.output_dir)
    seed = secrets.randbelow(10_000)
    [text] = generate_texts(model, tokenizer, [default_prompt(tokenizer)], temperature=TEMPERATURE, seed=seed)
    print(_format_summary(text, report, config, seed))
    return text


def _current_evaluation(
    run_dir: RunDir, weights: str, trained_on: Sequence[TrainingData]
) -> dict[str, Any] | None:
    """Return evaluation.json if it scores the weights in best/ on held-out stories of the run, else None."""
    try:
        found = run_dir.read_evaluation()
    except UserError as error:
        logger.warning("%s; evaluating again", error)
        return None
    manifest = run_dir.load_manifest()
    expected = {
        "weights_sha256": weights,
        "revision": manifest.provenance.revision,
        "split": "validation",
        "protocol": PROTOCOL,
    }
    # A base model may have been trained on stories that this run held out.
    if trained_on and len(trained_on) == num_records_of_last_run(trained_on):
        expected["num_training_stories"] = 0
    num_stories = min(EVAL_STORIES, manifest.splits["validation"]["num_stories"])
    differences = [name for name, value in expected.items() if found.get(name) != value]
    if found.get("num_stories", 0) < num_stories:
        differences.append("num_stories")
    if found and differences:
        logger.info("%s is of another %s; evaluating again", run_dir.evaluation, ", ".join(differences))
    return None if differences else found


def _evaluate_best(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    weights: str,
    trained_on: Sequence[TrainingData],
) -> dict[str, Any]:
    """Score the model in best/ on the first validation stories of its run.

    Raises:
        UserError: the data cannot be prepared, or are not those of the run.
    """
    run_dir = RunDir(config.output_dir)
    manifest = prepare_data(config.data, config.tokenizer)
    check_same_data(manifest, run_dir.path)
    logger.info("evaluating %s on at most %d validation stories", run_dir.best, EVAL_STORIES)
    texts = list(islice(iter_raw_stories(config.data.data_dir, "validation"), EVAL_STORIES))
    scores = score_texts(
        model,
        tokenizer,
        texts,
        batch_size=32,
        is_builtin_corpus=find_source(config.data.source).is_builtin_corpus,
        progress=True,
    )
    num_stories = manifest.splits["validation"]["num_stories"]
    return scores | {
        "model": f"{run_dir.path.name}/best",
        "weights_sha256": weights,
        "data": manifest.provenance.source,
        "revision": manifest.provenance.revision,
        "subset": manifest.provenance.subset,
        "split": "validation",
        "num_split_stories": num_stories,
        "num_source_stories": num_stories,
        "num_training_stories": count_training_stories(texts, trained_on) if trained_on else 0,
        "cleaning": manifest.provenance.cleaning,
        "protocol": PROTOCOL,
    }


def _write_card_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: RunDir, weights: str
) -> None:
    """Write stories.jsonl in the run directory: the completions with the seeds 0, 1, 2, not hand-picked."""
    sampling = SamplingParams(temperature=TEMPERATURE)
    prompts = [default_prompt(tokenizer)] * _NUM_SAMPLES
    requests = prepare_requests(model, tokenizer, prompts, range(_NUM_SAMPLES), sampling)
    # A list: an interruption must not leave a file with some of the stories.
    results = list(generate_batch(model, tokenizer, requests, sampling, batch_size=_NUM_SAMPLES))
    # A relative model path: the file is published, and an absolute path describes this machine.
    write_results(run_dir.stories, results, f"{run_dir.path.name}/best", weights, sampling)


def _format_summary(text: str, report: dict[str, Any], config: RunConfig, seed: int) -> str:
    """Return the summary that a run prints: generated text, metrics, files and next commands."""
    rule, run_dir = "-" * 78, config.output_dir
    again = "make story" + (
        "" if config.data.source == DataArgs().source else f" DATA={shlex.quote(config.data.source)}"
    )
    plan = read_json_object(RunDir(run_dir).plan)
    again += f" MINUTES={plan['minutes']:g}" if is_number(plan.get("minutes")) else ""
    generate = f"python scripts/generate.py --model {run_dir}/best"
    return f"""
{rule}
{text}
{rule}
{format_scores(report)}

run directory  {run_dir}: best/ is the model, report.html the report on one page,
               samples.md the text samples of training, metrics.jsonl the metrics, config.yaml the options
next           {again}     generates another text in seconds
               {again} MORE=10     trains ten minutes more
               source .venv/bin/activate
               {generate} --temperature {TEMPERATURE} --seed {seed}
               {generate} --prompt "One day, a little fox"
"""
