"""The main job from end to end: stories, tokenizer, tokens, training, evaluation, a story told."""

import json
import logging
import secrets
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config import RunConfig
from tinystories_slm.data.origin import BUILTIN
from tinystories_slm.data.sources import raw_stories
from tinystories_slm.evaluation.report import score_texts, summary
from tinystories_slm.generation import Sampling, begin, generate_stories, tell_stories
from tinystories_slm.generation.command import PROMPT, write_stories
from tinystories_slm.hub.card import write_card
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.training import finished, train, write_report

logger = logging.getLogger(__name__)

# Below 1 the story keeps to what the model is sure of; a model of minutes has little else to say.
TEMPERATURE = 0.3
_NUM_EVALUATED = 1000
_NUM_STORIES = 3


def story(config: RunConfig) -> str:
    """Train unless that is done, evaluate unless that is done, and tell a new story.

    Raises:
        InputError: whatever the steps refuse.
    """
    if not finished(config):
        train(config)
    best = config.output_dir / "best"
    model, tokenizer = load_model_folder(str(best))
    evaluation_path = config.output_dir / "evaluation.json"
    if not evaluation_path.exists():
        logger.info("evaluating %s on up to %d validation stories", best, _NUM_EVALUATED)
        texts = list(islice(raw_stories(config.data.data_dir, "validation"), _NUM_EVALUATED))
        report = score_texts(
            model,
            tokenizer,
            texts,
            batch_size=32,
            told_by_grammar=config.data.source == BUILTIN,
            progress=True,
        )
        evaluation_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _tell_for_the_card(model, tokenizer, config.output_dir)
        write_card(config.output_dir)
        write_report(config.output_dir)  # once more, with the evaluation
    report = json.loads(evaluation_path.read_text(encoding="utf-8"))
    seed = secrets.randbelow(10_000)
    [text] = generate_stories(model, tokenizer, [PROMPT], temperature=TEMPERATURE, seed=seed)
    print(_closing(text, report, config, seed))
    return text


def _tell_for_the_card(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Write RUN/stories.jsonl: what the model tells with the seeds 0, 1, ..., not chosen by anybody."""
    sampling = Sampling(temperature=TEMPERATURE)
    beginnings = begin(model, tokenizer, [PROMPT] * _NUM_STORIES, range(_NUM_STORIES), sampling)
    stories = tell_stories(model, tokenizer, beginnings, sampling, batch_size=_NUM_STORIES)
    # Relative: the file is published, and the path of a run tells of the machine.
    write_stories(run_dir / "stories.jsonl", stories, f"{run_dir.name}/best", sampling)


def _closing(text: str, report: dict[str, Any], config: RunConfig, seed: int) -> str:
    """What a run ends with: the story, the figures, where things are, what to type next."""
    rule, run_dir = "-" * 78, config.output_dir
    again = "make story" + (
        "" if config.data.source == BUILTIN else f" DATA={shlex.quote(config.data.source)}"
    )
    generate = f"python scripts/generate.py --model {run_dir}/best"
    return f"""
{rule}
{text}
{rule}
{summary(report)}

run folder     {run_dir}: best/ is the model, report.html the run on one page,
               samples.md its stories while it learned, metrics.jsonl and config.yaml the record
next           {again}     another story, in seconds
               source .venv/bin/activate
               {generate} --temperature {TEMPERATURE} --seed {seed}
               {generate} --prompt "One day, a little fox"
"""
