"""The model card: the template model_card.md, filled from a run's own files and nothing else."""

import json
import math
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from tinystories_slm.config import load_config
from tinystories_slm.data.origin import BUILTIN
from tinystories_slm.data.prepare import Manifest

TEMPLATE = Path(__file__).parents[2] / "model_card.md"


def write_card(run_dir: Path) -> Path:
    """Write `best/README.md`; figures of an evaluation.json, where the run has one, are in it.

    Returns:
        The path of the card.
    """
    config = load_config(run_dir / "config.yaml")
    manifest = Manifest.load(run_dir / "manifest.json")
    architecture = json.loads((run_dir / "best" / "config.json").read_text(encoding="utf-8"))
    evaluation = run_dir / "evaluation.json"
    figures = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.exists() else {}
    on_hub = manifest.source != BUILTIN and not manifest.revision.startswith("sha256:")
    card = ModelCard.from_template(
        ModelCardData(
            language="en",
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["tinystories", "small-language-model"],
            datasets=[manifest.source] if on_hub else None,
        ),
        template_path=str(TEMPLATE),
        name=run_dir.name,
        num_parameters=f"{_num_parameters(run_dir / 'best'):,}",
        num_layers=architecture["num_hidden_layers"],
        hidden_size=architecture["hidden_size"],
        num_heads=architecture["num_attention_heads"],
        context=architecture["max_position_embeddings"],
        vocab_size=f"{architecture['vocab_size']:,}",
        family=architecture["family"],
        source=_public_name(manifest),
        revision=manifest.revision,
        num_train_stories=f"{manifest.splits['train']['num_stories']:,}",
        num_train_tokens=f"{manifest.splits['train']['num_tokens']:,}",
        max_steps=config.train.max_steps,
        batch_size=config.train.batch_size,
        optimizer=config.train.optimizer,
        lr=config.train.lr,
        seed=config.train.seed,
        **figures,
    )
    path = run_dir / "best" / "README.md"
    card.save(path)
    return path


def _public_name(manifest: Manifest) -> str:
    """A Hub id as it is; of a local source only its last part, as a path tells of the machine."""
    if manifest.source == BUILTIN:
        return "the built-in corpus of tinystories_slm"
    return Path(manifest.source).name if manifest.revision.startswith("sha256:") else manifest.source


def _num_parameters(folder: Path) -> int:
    """Of a model folder: safetensors holds a tied matrix once."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    return sum(math.prod(shape) for shape in shapes)
