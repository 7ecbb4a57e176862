"""`custom`: the model folder of a run again, with this project's code beside the weights."""

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.export.checks import Check, compare, require_equal, require_same_ids
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import save_model_folder


def export_custom(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[Check]:
    """Fill `folder` with what `from_pretrained(folder, trust_remote_code=True)` loads anywhere.

    Raises:
        ExportError: the folder, loaded again, has other logits, greedy story or token ids.
    """
    save_model_folder(model, tokenizer, folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    require_same_ids("custom", tokenizer, load_tokenizer(str(folder)))
    dtype = str(model.dtype).removeprefix("torch.")
    return [require_equal(compare(f"custom, {dtype}", model, again, tokenizer))]
