"""Score of a model folder of the speedrun, by the protocol of `evaluate` and nothing of the run itself."""

from pathlib import Path
from typing import Any

from speedrun.editions import Edition

from tinystories_slm import register_auto_classes
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import score_texts
from tinystories_slm.model_folder import load_model_folder

_KEPT = ("bits_per_byte", "entropy_bits_per_byte", "num_stories", "num_bytes", "num_tokens")


def score_folder(folder: Path, edition: Edition, data: str | None) -> dict[str, Any]:
    """Return bits per byte of the validation stories, in float32 on the CPU, and their sizes.

    No code of the folder is run.

    Raises:
        UserError: the model cannot be loaded or scored, or its tokenizer loses text.
    """
    register_auto_classes()
    stories = edition.read_stories("validation", data)
    model, tokenizer = load_model_folder(str(folder), device="cpu")
    scores = score_texts(model, tokenizer, stories, batch_size=16, is_builtin_corpus=edition.is_builtin)
    if "bits_per_byte" not in scores:
        raise UserError(f"model ({folder}): its tokenizer loses text; use one that keeps every byte")
    return {name: scores[name] for name in _KEPT if name in scores}
