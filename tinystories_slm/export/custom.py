"""Export format `custom`: the model folder, with the model code of this project."""

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.export.checks import EquivalenceCheck, compare, require_equal, require_same_ids
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import save_model_folder


def export_custom(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[EquivalenceCheck]:
    """Write to `folder` what `from_pretrained(folder, trust_remote_code=True)` loads on any machine.

    Raises:
        ExportError: the folder, loaded again, differs in logits, greedy text or token ids.
    """
    save_model_folder(model, tokenizer, folder)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    require_same_ids("custom", tokenizer, load_tokenizer(str(folder)))
    dtype = str(model.dtype).removeprefix("torch.")
    return [require_equal(compare(f"custom, {dtype}", model, exported, tokenizer))]
