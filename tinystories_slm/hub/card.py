"""Write the model card: the template model_card.md, filled only from the files of a run."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from tokenizers import Tokenizer

from tinystories_slm.config import RunConfig
from tinystories_slm.data.chat_template import is_block_template
from tinystories_slm.data.instruct import InstructBlock, prompt_text
from tinystories_slm.data.sources.file_formats import first_line
from tinystories_slm.data.sources.registry import find_recorded_source
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import PROTOCOL
from tinystories_slm.evaluation.selection import WHOLE
from tinystories_slm.generation.prompts import DEFAULT_PROMPT
from tinystories_slm.hub.markdown import escape_code, escape_markdown, quote_markdown
from tinystories_slm.hub.published_run import PublishedRun
from tinystories_slm.io.atomic import write_text
from tinystories_slm.model_folder import weights_sha256
from tinystories_slm.resources import resource_path
from tinystories_slm.runs.records import describe_extension, is_number, validation_metrics
from tinystories_slm.runs.run_dir import RunDir, read_json_object

TESTED_TRANSFORMERS = ("5.10.1", "5.23.0", "5.24.0")
"""Versions of transformers that the model's code was run with (docs/versions.md): the lowest that setup.cfg
allows, the last with the earlier name of the cache, and the newest (constraints.txt)."""
_BLOCK_PROMPT = prompt_text(InstructBlock(words=("ball", "sad"), features=("Dialogue",)))
_MAX_STORIES = 3
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
# Key of evaluation.json: name in the metadata, label in the table, format.
_METRICS = {
    "loss": ("nats per token", "loss, nats per token", "{:.4f}"),
    "perplexity": ("perplexity", "perplexity", "{:.3f}"),
    "bits_per_byte": ("bits per byte", "bits per byte", "{:.4f}"),
    "accuracy": ("next-token accuracy", "next-token accuracy", "{:.1%}"),
}
# Key of stories.jsonl: format.
_SAMPLING_PARAMETERS = {
    "temperature": "temperature {}",
    "top_k": "top-k {}",
    "top_p": "top-p {}",
    "min_p": "min-p {}",
    "repetition_penalty": "repetition penalty {}",
    "max_new_tokens": "at most {} new tokens",
    "seed": "seed {}",
}


@dataclass(frozen=True, kw_only=True)
class CardTarget:
    """Location of the card, which determines its code examples; by default best/ of the run directory."""

    model_id: str = "."
    """Argument of `from_pretrained` in the examples."""
    on_hub: bool = False
    """Whether `model_id` is a Hub repository, which holds the records of the run in run/."""
    custom: bool = True
    """Whether the root holds the model with this project's code."""
    native_class: str | None = None
    """Model class of transformers, if the target holds the `native` format."""
    license: str | None = None
    """License of the model; None if its owner states none."""


def write_card(run_dir: Path) -> Path:
    """Write `best/README.md` from the files of the run.

    Returns:
        The path of the card.

    Raises:
        UserError: best/ does not hold a model, or a file of the run is damaged.
    """
    path = RunDir(run_dir).best / "README.md"
    write_text(path, render_card(PublishedRun.load(run_dir), CardTarget()))
    return path


def is_card_current(run_dir: Path) -> bool:
    """Whether `best/README.md` has the weights, the metrics and the stories of the run as they are now.

    What people added to it does not matter.

    Raises:
        UserError: as `write_card`.
    """
    path = RunDir(run_dir).best / "README.md"
    if not path.is_file():
        return False
    run, card = PublishedRun.load(run_dir), path.read_text(encoding="utf-8", errors="replace")
    stories = [_format_story(line)["text"] for line in _card_stories(run)]
    values = [f"| {label} | {value} |" for label, value in _metric_rows(run.evaluation)]
    return all(fact in card for fact in (str(weights_sha256(run.files.best)), *values, *stories))


def render_card(run: PublishedRun, target: CardTarget) -> str:
    """Return the text of the card; it omits everything that the run has not recorded.

    Raises:
        UserError: the installation lacks the template.
    """
    name = target.model_id.split("/")[-1] if target.on_hub else run.name
    facts = {
        "name": escape_markdown(name),
        "protocol": escape_markdown(run.evaluation.get("protocol", PROTOCOL)),
        "package": _package_label(run),
        "tested_transformers": ", ".join(TESTED_TRANSFORMERS),
        "recipe": _recipe(run),
        "metric_rows": _metric_rows(run.evaluation),
        "stories": [_format_story(line) for line in _card_stories(run)],
        "hardware": _hardware(run),
        "base_model": run.base_model,
        **_usage_facts(target),
        **_architecture_facts(run, has_weights_of_best=target.custom),
        **_prompt_facts(run.files.best),
        **_data_facts(run),
        **_eval_facts(run),
    }
    if run.files.loss_plot.is_file():
        facts["plot"] = "run/loss.png" if target.on_hub else "../loss.png"
    known = {name: fact for name, fact in facts.items() if fact is not None}
    template = str(resource_path("model_card.md"))
    card = ModelCard.from_template(_metadata(run, target, name), template_path=template, **known)
    return str(card).rstrip() + "\n"


def _metadata(run: PublishedRun, target: CardTarget, name: str) -> ModelCardData:
    results = _eval_results(run)
    dataset_ids = list(run.story_source.dataset_ids) if run.story_source else None
    return ModelCardData(
        language="en",
        license=target.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tinystories", "small-language-model"],
        datasets=dataset_ids or None,
        base_model=run.base_model,
        metrics=[r.metric_type for r in results if r.metric_type in ("perplexity", "accuracy")] or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_results(run: PublishedRun) -> list[EvalResult]:
    evaluation = run.evaluation
    dataset, revision = _eval_source(run)
    if dataset is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=_source_label(dataset, revision),
            dataset_split=evaluation.get("split", "validation"),
            dataset_config=evaluation.get("subset", run.manifest.get("subset")),
            dataset_revision=revision,
            metric_type=metric,
            metric_name=name,
            metric_value=evaluation[metric],
        )
        for metric, (name, _, _) in _METRICS.items()
        if _is_number(evaluation.get(metric))
    ]


def _usage_facts(target: CardTarget) -> dict[str, Any]:
    return {
        "model_id": target.model_id,
        "on_hub": target.on_hub,
        "custom": target.custom,
        "native": target.native_class is not None,
        "native_class": f"`{target.native_class}`",
        "native_options": ', subfolder="native"' if target.custom else "",
    }


def _prompt_facts(best: Path) -> dict[str, Any]:
    """Return the arguments that tokenize a prompt as training began texts, in every form of the model.

    The tokenizers of commit 461afef do not add the start token, or add another one.
    """
    try:
        tokenizer = Tokenizer.from_file(str(best / "tokenizer.json"))
    except Exception as error:  # tokenizers raises no other type
        raise UserError(
            f"{best / 'tokenizer.json'} cannot be read ({first_line(error)}); restore it"
        ) from error
    eos = read_json_object(best / "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos  # transformers 4 may write an object
    if not isinstance(eos, str):
        raise UserError(f"{best / 'tokenizer_config.json'} must have the text of eos_token; restore it")
    adds_start = tokenizer.encode("").ids == [tokenizer.token_to_id(eos)]
    template = best / "chat_template.jinja"
    reads_blocks = template.is_file() and is_block_template(template.read_text(encoding="utf-8"))
    prompt = _BLOCK_PROMPT if reads_blocks else DEFAULT_PROMPT
    prompt = prompt if adds_start else eos + prompt
    return {
        "prompt_arguments": json.dumps(prompt) + ("" if adds_start else ", add_special_tokens=False"),
        "start_token": escape_code(eos),
        "adds_start": adds_start,
    }


def _architecture_facts(run: PublishedRun, *, has_weights_of_best: bool) -> dict[str, Any]:
    config = _read_model_config(run.files.best)
    llama = "Qwen3" if config.get("qk_norm") else "Llama"
    return {
        "num_parameters": f"{_num_parameters(run.files.best):,}",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "context": config["max_position_embeddings"],
        "vocab_size": f"{config['vocab_size']:,}",
        "weights_sha256": weights_sha256(run.files.best) if has_weights_of_best else None,
        "training_step": None if (step := run.files.read_best_step()) is None else f"{step:,}",
        "architecture": {"gpt2": "GPT-2", "llama": llama}.get(config.get("family", "")),
    }


def _read_model_config(best: Path) -> dict[str, Any]:
    """Return config.json of a model folder.

    Raises:
        UserError: it is damaged, or lacks a size of the model.
    """
    path = best / "config.json"
    config = read_json_object(path, dict.fromkeys(_SIZES, int) | {"family": str})
    if missing := [name for name in _SIZES if name not in config]:
        raise UserError(f"{path} must have {', '.join(missing)}; train again, or set --run to another run")
    return config


def _data_facts(run: PublishedRun) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if run.source is not None:
        facts["source"] = _source_link(run.source, run.manifest.get("revision"), run.manifest.get("subset"))
        facts["data_license"] = run.story_source.license if run.story_source else None
    if "revision" in run.manifest:
        facts["revision"] = escape_code(run.manifest["revision"])
    for split, counts in run.manifest.get("splits", {}).items():
        if not isinstance(counts, dict):
            continue
        facts |= {
            name.replace("num_", f"num_{split}_"): f"{value:,}"
            for name, value in counts.items()
            if _is_number(value)
        }
    if run.manifest.get("streaming") is True:
        read = [line["train/num_stories_read"] for line in run.metrics if "train/num_stories_read" in line]
        facts["num_stories_read"] = f"{read[-1]:,}" if read else "an unknown number of"
    facts |= _filter_facts(run.manifest)
    if run.config is not None:
        pretrained = run.config.tokenizer.pretrained
        trained_here = "byte-level BPE, trained on these stories"
        facts["tokenizer"] = trained_here if pretrained is None else f"`{escape_code(pretrained)}`"
    return facts


def _filter_facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what cleaning and deduplication did, as far as the data manifest states it."""
    facts = {}
    counts, duplicates = manifest.get("cleaning_counts"), manifest.get("duplicates")
    if isinstance(counts, dict):
        changes = [
            f"{escape_markdown(str(rule))} {count['num_changed']:,} repaired, {count['num_dropped']:,} "
            "dropped"
            for rule, count in counts.items()
            if isinstance(count, dict)
            and all(_is_number(count.get(f"num_{name}")) for name in ("changed", "dropped"))
        ]
        facts["cleaning"] = "; ".join(changes) or "no story was changed"
    numbers = ("num_exact", "num_near", "num_leaks", "num_validation_leaked", "leak_ngram", "leak_share")
    if isinstance(duplicates, dict) and all(_is_number(duplicates.get(name)) for name in numbers):
        facts["duplicates"] = (
            f"{duplicates['num_exact']:,} exact and {duplicates['num_near']:,} near ones dropped from "
            f"training; {duplicates['num_validation_leaked']:,} validation stories shared more than "
            f"{duplicates['leak_share']:.0%} of their {duplicates['leak_ngram']}-word sequences with a "
            f"training story, none after {duplicates['num_leaks']:,} training stories were dropped"
        )
    return facts


def _recipe(run: PublishedRun) -> list[tuple[str, str]]:
    """Return (option, value) of the training recipe, as far as it is known."""
    rows = _config_rows(run.config) if run.config else {}
    precision = run.environment.get(
        "mixed_precision", run.config.train.mixed_precision if run.config else None
    )
    last, best = _last_metrics(run), validation_metrics(run.metrics, run.files.read_best_step())
    steps = f"{last['step']:,}" if "step" in last else None
    if steps and run.config and run.config.train.max_steps != last["step"]:
        steps += f" of {run.config.train.max_steps:,}"
    rows |= {
        "optimizer steps": steps,
        "extensions": "; ".join(map(describe_extension, run.files.read_extensions())) or None,
        "training tokens": f"{last['tokens']:,}" if "tokens" in last else None,
        "mixed precision": None if precision == "auto" else precision,
        "seed": run.config.train.seed if run.config else None,
        "best model": _format_best(best) if best else None,
    }
    return [(name, escape_markdown(str(value))) for name, value in rows.items() if value is not None]


def _config_rows(config: RunConfig) -> dict[str, Any]:
    train = config.train
    return {
        "optimizer": train.optimizer,
        "peak learning rate": f"{train.lr}, scaled to width and batch" if train.lr_scaling else train.lr,
        "schedule": train.schedule,
        "warm-up, optimizer steps": train.warmup_steps,
        "final learning rate, share of the peak": train.min_lr_rate,
        "weight decay": train.weight_decay,
        "EMA decay": train.ema_decay,
        "gradient clipping, norm": train.max_grad_norm,
        "dropout": config.model.dropout,
        "sequences per step": f"{train.batch_size} of {config.data.seq_len} tokens",
    }


def _metric_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, form.format(evaluation[metric]))
        for metric, (_, label, form) in _METRICS.items()
        if _is_number(evaluation.get(metric))
    ]


def _eval_facts(run: PublishedRun) -> dict[str, Any]:
    evaluation, facts = run.evaluation, {}
    source, revision = _eval_source(run)
    if source is not None:
        split = str(evaluation.get("split", "validation"))
        stories = "all stories" if split == WHOLE else f"the {escape_markdown(split)} stories"
        at = f" (revision `{escape_code(revision)}`)" if revision else ""
        subset = evaluation.get("subset", run.manifest.get("subset"))
        facts["evaluated_on"] = f"{stories} of {_source_link(source, revision, subset)}{at}"
        if trained := evaluation.get("num_training_stories"):
            facts["evaluated_on"] += f", {trained:,} of which the model was trained on"
    if all(_is_number(evaluation.get(name)) for name in ("num_stories", "num_tokens", "num_bytes")):
        facts |= {name: f"{evaluation[name]:,}" for name in ("num_stories", "num_tokens", "num_bytes")}
    if all(_is_number(evaluation.get(name)) for name in ("entropy", "entropy_bits_per_byte")):
        facts |= {name: f"{evaluation[name]:.4f}" for name in ("entropy", "entropy_bits_per_byte")}
    return facts


def _eval_source(run: PublishedRun) -> tuple[str | None, str | None]:
    """Return source and revision of the scored stories: the run's own, or those in evaluation.json."""
    if "data" in run.evaluation:
        return run.evaluation["data"], run.evaluation.get("revision")
    return run.source, run.manifest.get("revision")


def _format_story(line: Mapping[str, Any]) -> dict[str, str]:
    """Return the sampling parameters of a line of stories.jsonl as a sentence, and its text as a quote."""
    parameters = [
        form.format(line[key]) for key, form in _SAMPLING_PARAMETERS.items() if line.get(key) is not None
    ]
    prompt = [f'prompt "{line["prompt"]}"'] if line.get("prompt") else []
    sentence = escape_markdown(", ".join([*prompt, *parameters]))
    return {
        "parameters": f"{sentence[:1].upper()}{sentence[1:]}:",
        "text": quote_markdown(str(line["story"])),
    }


def _hardware(run: PublishedRun) -> list[str]:
    environment, seconds = run.environment, _last_metrics(run).get("seconds")
    lines = []
    for session in environment.get("earlier_sessions", []):
        lines.append(f"from step {session.get('first_step', 1)}: {session.get('hardware')}")
    if "hardware" in environment:
        since = f"from step {environment.get('first_step', 1)}: " if lines else ""
        lines.append(since + str(environment["hardware"]))
    if _is_number(environment.get("num_processes")) and "device" in environment:
        lines.append(f"{environment['num_processes']} process(es) on {environment['device']}")
    if _is_number(seconds):
        lines.append(f"{seconds / 60:,.1f} minutes of training, including evaluations")
    packages = environment.get("packages") or {}
    if packages:
        lines.append(", ".join(f"{name} {version}" for name, version in packages.items()))
    return [escape_markdown(line) for line in lines]


def _package_label(run: PublishedRun) -> str:
    packages = run.environment.get("packages") or {}
    version = packages.get("tinystories_slm", run.manifest.get("code_version"))
    return "`tinystories_slm`" + (f" {escape_markdown(str(version))}" if version else "")


def _last_metrics(run: PublishedRun) -> dict[str, Any]:
    return run.metrics[-1] if run.metrics else {}


def _format_best(line: Mapping[str, Any]) -> str:
    text = f"step {line['step']:,}, validation loss {line['val/loss']:.4f}"
    stories = line.get("val/num_stories")
    return text if stories is None else f"{text} of {stories:,} stories"


def _card_stories(run: PublishedRun) -> list[dict[str, Any]]:
    return [line for line in run.stories if "story" in line][:_MAX_STORIES]


def _source_link(value: str, revision: str | None, subset: str | None = None) -> str:
    source = find_recorded_source(value, revision, subset)
    subset_phrase = f" (configuration `{escape_code(subset)}`)" if subset else ""
    if source and source.dataset_id:
        link = f"[`{source.dataset_id}`](https://huggingface.co/datasets/{source.dataset_id})"
        is_named = source.dataset_id != value
        return (f"`{escape_code(value)}`, from {link}" if is_named else link) + subset_phrase
    return ((source and source.label) or f"`{escape_code(value)}`") + subset_phrase


def _source_label(value: str, revision: str | None) -> str:
    source = find_recorded_source(value, revision)
    return (source and source.label) or value


def _is_number(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def _num_parameters(folder: Path) -> int:
    """Return the number of parameters in a model folder; safetensors stores a tied matrix once."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a mapping)
    return sum(math.prod(shape) for shape in shapes)
