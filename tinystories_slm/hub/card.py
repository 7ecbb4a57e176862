"""The model card: the template model_card.md, filled from a run's own files and nothing else."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from tinystories_slm.data.origin import BUILTIN
from tinystories_slm.errors import InputError
from tinystories_slm.evaluation.report import PROTOCOL
from tinystories_slm.hub.markdown import code, escaped, quoted
from tinystories_slm.hub.record import Record, hub_id

TEMPLATE = Path(__file__).parents[2] / "model_card.md"

# A licence is stated where it is known for certain; any other dataset's own page has the word.
DATA_LICENSES = {
    "roneneldan/TinyStories": "[CDLA-Sharing-1.0](https://cdla.dev/sharing-1-0/)",
    BUILTIN: "MIT, as the package that tells them",
}
TESTED_TRANSFORMERS = ("5.10.1", "5.23.0", "5.24.0")
"""Versions of transformers that the tests run the model's code with: the lowest that setup.cfg allows, the
last with the cache's earlier name, and the newest (constraints.txt)."""
_NUM_STORIES = 3
_METRICS = {
    "loss": "nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy of the next token",
}


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Where a card stands, as its lines to copy differ by it; as it is here, in best/ of the run folder."""

    model_id: str = "."
    """What its readers pass to `from_pretrained`."""
    on_hub: bool = False
    """Whether `model_id` is a repository on the Hub, where the run's record is beside the card."""
    custom: bool = True
    """Whether the form with this project's code is there, in the root."""
    native_class: str | None = None
    """transformers' class of the native form, if that is there."""
    license: str | None = None
    """The model's, as its owner states it."""


def write_card(run_dir: Path) -> Path:
    """Write `best/README.md`, from as much as the run's files tell so far.

    Returns:
        The path of the card.

    Raises:
        InputError: there is no model in best/, or a file of the run is broken.
    """
    path = run_dir / "best" / "README.md"
    path.write_text(render_card(Record.load(run_dir), Publication()), encoding="utf-8")
    return path


def render_card(record: Record, publication: Publication) -> str:
    """The text of the card; what the record does not tell is not in it.

    Raises:
        InputError: the template is not where a clone of the repository has it.
    """
    if not TEMPLATE.is_file():
        raise InputError(f"{TEMPLATE} is missing; install this package from its clone: pip install -e .")
    name = publication.model_id.split("/")[-1] if publication.on_hub else record.name
    facts = {
        "name": escaped(name),
        "protocol": escaped(record.evaluation.get("protocol", PROTOCOL)),
        "kit": _kit(record),
        "tested_transformers": ", ".join(TESTED_TRANSFORMERS),
        "recipe": _recipe(record),
        "figures": _figures(record.evaluation),
        "stories": [_story(line) for line in record.stories if "story" in line][:_NUM_STORIES],
        "hardware": _hardware(record),
        "base_model": hub_id(record.config.get("train", {}).get("init_from")),
        **_use(publication),
        **_architecture(record),
        **_data(record),
        **_evaluated(record),
    }
    if (record.run_dir / "loss.png").is_file():
        facts["plot"] = "run/loss.png" if publication.on_hub else "../loss.png"
    stated = {name: fact for name, fact in facts.items() if fact is not None}
    metadata = _metadata(record, publication, name)
    return str(ModelCard.from_template(metadata, template_path=str(TEMPLATE), **stated)).rstrip() + "\n"


def _metadata(record: Record, publication: Publication, name: str) -> ModelCardData:
    results = _eval_results(record)
    return ModelCardData(
        language="en",
        license=publication.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tinystories", "small-language-model"],
        datasets=[record.source] if record.source_on_hub else None,
        base_model=hub_id(record.config.get("train", {}).get("init_from")),
        metrics=[r.metric_type for r in results if r.metric_type in ("perplexity", "accuracy")] or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_results(record: Record) -> list[EvalResult]:
    evaluation = record.evaluation
    dataset, revision = _evaluated_stories(record)
    if dataset is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=_told_by(dataset),
            dataset_split=evaluation.get("split", "validation"),
            dataset_revision=revision,
            metric_type=metric,
            metric_name=name,
            metric_value=evaluation[metric],
        )
        for metric, name in _METRICS.items()
        if _is_number(evaluation.get(metric))
    ]


def _use(publication: Publication) -> dict[str, Any]:
    return {
        "model_id": publication.model_id,
        "on_hub": publication.on_hub,
        "custom": publication.custom,
        "native": publication.native_class is not None,
        "native_class": f"`{publication.native_class}`",
        "native_options": ', subfolder="native"' if publication.custom else "",
    }


def _architecture(record: Record) -> dict[str, Any]:
    best = record.run_dir / "best"
    config = json.loads((best / "config.json").read_text(encoding="utf-8"))
    modern = "Qwen3" if config.get("qk_norm") else "Llama"
    return {
        "num_parameters": f"{_num_parameters(best):,}",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "context": config["max_position_embeddings"],
        "vocab_size": f"{config['vocab_size']:,}",
        "mathematics": {"gpt": "GPT-2", "modern": modern}.get(config.get("family", "")),
    }


def _data(record: Record) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if record.source is not None:
        facts["source"] = _linked(record.source, on_hub=record.source_on_hub)
        if record.source_on_hub or record.source == BUILTIN:
            facts["data_license"] = DATA_LICENSES.get(record.source)
    if "revision" in record.manifest:
        facts["revision"] = code(record.manifest["revision"])
    for split, counts in record.manifest.get("splits", {}).items():
        facts |= {
            name.replace("num_", f"num_{split}_"): f"{value:,}"
            for name, value in counts.items()
            if _is_number(value)
        }
    tokenizer = record.config.get("tokenizer", {})
    if (pretrained := tokenizer.get("pretrained")) is not None:
        facts["tokenizer"] = f"that of `{code(pretrained)}`"
    elif tokenizer:
        facts["tokenizer"] = "an own byte-level BPE, trained on these stories"
    return facts


def _recipe(record: Record) -> list[tuple[str, str]]:
    train, last = record.config.get("train", {}), _last(record)
    steps = f"{last['step']:,}" if "step" in last else None
    if steps and "max_steps" in train and train["max_steps"] != last["step"]:
        steps += f" of {train['max_steps']:,}"
    batch = train.get("batch_size")
    seq_len = record.config.get("data", {}).get("seq_len")
    precision = record.environment.get("mixed_precision", train.get("mixed_precision"))
    best = _best(record)
    rows = {
        "optimizer": train.get("optimizer"),
        "peak learning rate": f"{train.get('lr')}, scaled to width and batch"
        if train.get("lr_scaling")
        else train.get("lr"),
        "schedule": train.get("schedule", train.get("lr_schedule")),
        "warm-up, optimizer steps": train.get("warmup_steps"),
        "final share of the peak": train.get("min_lr_rate"),
        "weight decay": train.get("weight_decay"),
        "average of the weights, decay": train.get("ema_decay"),
        "gradient norm at most": train.get("max_grad_norm"),
        "dropout": record.config.get("model", {}).get("dropout"),
        "sequences per step": f"{batch} of {seq_len} tokens" if batch and seq_len else batch,
        "optimizer steps": steps,
        "training tokens": f"{last['tokens']:,}" if "tokens" in last else None,
        "mixed precision": None if precision == "auto" else precision,
        "seed": train.get("seed"),
        "these weights": f"step {best['step']:,}, validation loss {best['val/loss']:.4f}" if best else None,
    }
    return [(what, escaped(str(value))) for what, value in rows.items() if value is not None]


def _figures(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    forms = {
        "loss": ("loss, nats per token", "{:.4f}"),
        "perplexity": ("perplexity", "{:.3f}"),
        "bits_per_byte": ("bits per byte", "{:.4f}"),
        "accuracy": ("accuracy of the next token", "{:.1%}"),
    }
    return [
        (what, form.format(evaluation[name]))
        for name, (what, form) in forms.items()
        if _is_number(evaluation.get(name))
    ]


def _evaluated(record: Record) -> dict[str, Any]:
    evaluation, facts = record.evaluation, {}
    source, revision = _evaluated_stories(record)
    if source is not None:
        split = escaped(str(evaluation.get("split", "validation")))
        at = f" (revision `{code(revision)}`)" if revision else ""
        facts["evaluated_on"] = f"the {split} stories of {_linked(source, on_hub=_is_commit(revision))}{at}"
    if all(_is_number(evaluation.get(name)) for name in ("num_stories", "num_tokens", "num_bytes")):
        facts |= {name: f"{evaluation[name]:,}" for name in ("num_stories", "num_tokens", "num_bytes")}
    if all(_is_number(evaluation.get(name)) for name in ("entropy", "entropy_bits_per_byte")):
        facts |= {name: f"{evaluation[name]:.4f}" for name in ("entropy", "entropy_bits_per_byte")}
    return facts


def _evaluated_stories(record: Record) -> tuple[str | None, str | None]:
    """Source and revision; where evaluation.json names none, they are the run's own validation stories."""
    if "data" in record.evaluation:
        return record.evaluation["data"], record.evaluation.get("revision")
    return record.source, record.manifest.get("revision")


def _story(line: Mapping[str, Any]) -> dict[str, str]:
    """One of stories.jsonl: its sampling settings as a sentence, its text as a quotation."""
    settings = {
        "temperature": "temperature {}",
        "top_k": "top-k {}",
        "top_p": "top-p {}",
        "min_p": "min-p {}",
        "repetition_penalty": "repetition penalty {}",
        "max_new_tokens": "at most {} new tokens",
        "seed": "seed {}",
    }
    told = [form.format(line[key]) for key, form in settings.items() if line.get(key) is not None]
    prompt = [f'prompt "{line["prompt"]}"'] if line.get("prompt") else []
    sentence = escaped(", ".join([*prompt, *told]))
    return {"settings": f"{sentence[:1].upper()}{sentence[1:]}:", "text": quoted(str(line["story"]))}


def _hardware(record: Record) -> list[str]:
    environment, seconds = record.environment, _last(record).get("seconds")
    lines = []
    if "hardware" in environment:
        lines.append(str(environment["hardware"]))
    if _is_number(environment.get("num_processes")) and "device" in environment:
        lines.append(f"{environment['num_processes']} process(es) on {environment['device']}")
    if _is_number(seconds):
        lines.append(f"{seconds / 60:,.1f} minutes of training, its evaluations included")
    packages = environment.get("packages") or {}
    if packages:
        lines.append(", ".join(f"{name} {number}" for name, number in packages.items()))
    return [escaped(line) for line in lines]


def _kit(record: Record) -> str:
    packages = record.environment.get("packages") or {}
    number = packages.get("tinystories_slm", record.manifest.get("code_version"))
    return "`tinystories_slm`" + (f" {escaped(str(number))}" if number else "")


def _last(record: Record) -> dict[str, Any]:
    return record.metrics[-1] if record.metrics else {}


def _best(record: Record) -> dict[str, Any] | None:
    """The line of metrics.jsonl whose weights best/ holds."""
    evaluated = [line for line in record.metrics if _is_number(line.get("val/loss")) and "step" in line]
    return min(evaluated, key=lambda line: line["val/loss"], default=None)


def _linked(source: str, *, on_hub: bool) -> str:
    if on_hub:
        return f"[`{source}`](https://huggingface.co/datasets/{source})"
    return _told_by(source) if source == BUILTIN else f"`{code(source)}`"


def _told_by(source: str) -> str:
    return "the built-in corpus of tinystories_slm" if source == BUILTIN else source


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _num_parameters(folder: Path) -> int:
    """Of a model folder: safetensors holds a tied matrix once."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    return sum(math.prod(shape) for shape in shapes)
