"""Number of stories that the quickstart reads of a large source."""

import json
import logging
from dataclasses import replace

from tinystories_slm.config import DataArgs, RunConfig
from tinystories_slm.data.source_stories import open_stories
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.errors import UserError

logger = logging.getLogger(__name__)

# More than any tokenizer of English text reaches, so that the run reads no story twice.
_BYTES_PER_TOKEN = 6


def limit_stories(config: RunConfig) -> RunConfig:
    """Set `data.max_stories` to as many stories as the run reads, if the source has more.

    The built-in corpus, a limit of the user, a stream, and prepared data with at least as many stories are
    kept.

    Raises:
        UserError: the source cannot be read.
    """
    data, train = config.data, config.train
    is_builtin_corpus = find_source(data.source, data.subset).is_builtin_corpus
    if is_builtin_corpus or data.max_stories is not None or data.streaming:
        return config
    needed = train.max_steps * train.batch_size * data.seq_len * _BYTES_PER_TOKEN
    prepared, num_bytes = _prepared_stories(config)
    if prepared is not None and (prepared == 0 or num_bytes >= needed):
        return _with_limit(config, prepared or None)
    try:
        limit = _count_stories(data, needed)
    except UserError:
        if prepared is None:
            raise
        limit = prepared  # the stories are here, the source is not
    if prepared is not None and limit is not None:
        limit = max(limit, prepared)
    return _with_limit(config, limit)


def _with_limit(config: RunConfig, limit: int | None) -> RunConfig:
    if limit is not None:
        logger.info("the run reads no more than the first %s training stories", f"{limit:,}")
    return replace(config, data=replace(config.data, max_stories=limit))


def _count_stories(data: DataArgs, num_bytes: int) -> int | None:
    """Return how many training stories fill `num_bytes`; None if all of them do not."""
    splits = open_stories(
        data.source, text_column=data.text_column, revision=data.revision, subset=data.subset
    )
    total = 0
    for number, story in enumerate(splits["train"]() if "train" in splits else (), start=1):
        total += len(story.encode("utf-8"))
        if total >= num_bytes:
            return number
    return None


def _prepared_stories(config: RunConfig) -> tuple[int | None, int]:
    """Return `max_stories` of the prepared data, 0 for all stories, and the bytes of their text.

    None and 0 without data of this source.
    """
    try:
        text = (config.data.data_dir / "raw" / "source.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        if manifest["source"] != config.data.source:
            return None, 0
        return manifest["max_stories"] or 0, sum(split["num_bytes"] for split in manifest["splits"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, 0
