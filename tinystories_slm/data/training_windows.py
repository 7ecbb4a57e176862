"""The windows that a run trains on, as its configuration selects them."""

from tinystories_slm.config import RunConfig
from tinystories_slm.data.exclusion import excluded_stories
from tinystories_slm.data.packing import PackedDataset, packing_class
from tinystories_slm.data.token_files import Manifest, open_prompt_lengths


def open_windows(config: RunConfig, manifest: Manifest) -> PackedDataset:
    """Return the training windows of `config` in the prepared data that `manifest` describes.

    Raises:
        UserError: a file is missing or damaged, `data.loss_on` needs prompts that the data do not have,
            or `data.exclude` selects no story.
    """
    data = config.data
    has_prompts = data.loss_on == "story"
    return packing_class(data.packing)(
        data.data_dir / "train.bin",
        token_dtype=manifest.token_dtype,
        seq_len=data.seq_len,
        seed=config.train.seed,
        eos_token_id=manifest.eos_token_id,
        mask_across_stories=data.mask_across_stories,
        excluded=excluded_stories(data, manifest.splits["train"]["num_stories"]),
        prompt_lengths=open_prompt_lengths(data.data_dir, "train", manifest) if has_prompts else None,
    )
