"""Measure prepared stories, and write report.json, report.html and the dataset card README.md."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from tinystories_slm.config import RunConfig
from tinystories_slm.data.batches import iter_batches
from tinystories_slm.data.filters.cleaning import is_not_english
from tinystories_slm.data.provenance import Provenance
from tinystories_slm.data.raw_stories import RawManifest, download_data, iter_raw_stories
from tinystories_slm.data.source_stories import StoryCounts
from tinystories_slm.data.sources.named_sets import NAMED_SETS
from tinystories_slm.data.sources.registry import find_recorded_source
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.tokenizer import count_story_chunks, load_tokenizer, stride_sample
from tinystories_slm.data_report.card import render_card
from tinystories_slm.data_report.filters import Cleaning, Repeated, find_faults, find_repeated
from tinystories_slm.data_report.page import render_page
from tinystories_slm.data_report.text import (
    CountedText,
    Quantiles,
    count_lower_words,
    histograms,
    quantiles,
    read_text,
)
from tinystories_slm.data_report.vocabularies import Vocabulary, compare_vocabularies, describe_choice
from tinystories_slm.io.atomic import directory_lock, write_text

logger = logging.getLogger(__name__)

MAX_STORIES = 200_000
"""Training stories, evenly spaced, that are measured; memory and time do not grow beyond them."""
_MAX_VALIDATION = 50_000
_NUM_LISTED = 12
_BATCH_STORIES = 4096
_ENGLISH_SAMPLE = 200


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Contents of report.json."""

    source: str
    """`data.source`, without a path of this machine."""
    provenance: Provenance
    splits: dict[str, StoryCounts]
    license: str | None
    """License of the stories in Markdown; null if it is not known."""
    dataset_ids: list[str]
    """Datasets of the Hub that the stories are from."""
    citations: list[str]
    """Publications of these datasets, of named sets."""
    is_english: bool
    """Whether most of the first stories have English function words."""
    num_sampled: int
    """Training stories that were measured, evenly spaced."""
    seq_len: int
    """`data.seq_len`."""
    lengths: dict[str, dict[str, Quantiles]]
    """Split -> `characters`, `words` and `tokens` of its stories; tokens with `<|endoftext|>`."""
    histograms: dict[str, dict[str, list[tuple[float, float]]]]
    """`words` and `tokens` -> split -> middle of a bin and share of the stories in it."""
    share_in_window: float
    """Share of the training stories that fit into `data.seq_len` tokens."""
    tokenizer: str
    """Tokenizer of the lengths, in words."""
    openings: list[CountedText]
    num_openings: int
    """Number of different openings."""
    names: list[CountedText]
    growth: list[tuple[int, int]]
    """Words read, and distinct words among them."""
    frequent_share: float
    """Share of the text that the 1,000 most frequent words fill."""
    vocabularies: list[Vocabulary]
    choice: str
    """Sentence that states which vocabulary to choose."""
    cleaning: Cleaning | None
    """Null for the built-in corpus, as the next one."""
    repeated: Repeated | None
    """Null also if the stories are too many to compare."""


def write_data_report(config: RunConfig) -> DataReport:
    """Write report.json, report.html and README.md to `config.data.data_dir`; first download the stories.

    Raises:
        UserError: as `download_data`.
    """
    download_data(config.data)
    folder = config.data.data_dir
    report = measure(config)
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n"
    with directory_lock(folder, option="data.data_dir"):
        write_text(folder / "report.json", text)
        write_text(folder / "README.md", render_card(report, folder="raw"))
        write_text(folder / "report.html", render_page(report))
    return report


def measure(config: RunConfig) -> DataReport:
    """Measure the stories in `config.data.data_dir`/raw."""
    folder = config.data.data_dir
    raw = RawManifest.load(folder / "raw" / "source.json")
    num_train = raw.splits["train"]["num_stories"]
    num_sampled = min(MAX_STORIES, num_train)
    num_validation = min(_MAX_VALIDATION, raw.splits["validation"]["num_stories"])
    read_split = partial(iter_raw_stories, folder)

    def sample() -> Iterator[str]:
        return stride_sample(read_split("train"), num_train, num_sampled)

    def validation() -> Iterator[str]:
        return islice(read_split("validation"), num_validation)

    bar = tqdm(sample(), desc="text", total=num_sampled, unit=" stories", disable=None)
    texts = {"train": read_text(bar, num_sampled), "validation": read_text(validation(), num_validation)}
    chunks = _count_chunks(sample())
    vocabularies, trained = compare_vocabularies(config, chunks, _count_chunks(validation()), num_validation)
    tokenizer = trained or load_tokenizer(config.tokenizer.pretrained)
    tokens = {
        "train": _token_lengths(tokenizer, sample()),
        "validation": _token_lengths(tokenizer, validation()),
    }
    provenance = raw.provenance
    source = find_recorded_source(provenance.source, provenance.revision, provenance.subset)
    dataset_ids = list(source.dataset_ids) if source else []
    is_builtin = source is not None and source.is_builtin_corpus
    public_name = source.public_name() if source else Path(provenance.source).name
    return DataReport(
        source=public_name,
        provenance=Provenance(**asdict(provenance) | {"source": public_name}),
        splits=raw.splits,
        license=source.license if source else None,
        dataset_ids=dataset_ids,
        citations=list(
            dict.fromkeys(named.citation for named in NAMED_SETS.values() if named.repository in dataset_ids)
        ),
        is_english=_is_english(list(islice(sample(), _ENGLISH_SAMPLE))),
        num_sampled=num_sampled,
        seq_len=config.data.seq_len,
        lengths={
            split: {
                "characters": quantiles(text.num_chars),
                "words": quantiles(text.num_words),
                "tokens": quantiles(tokens[split]),
            }
            for split, text in texts.items()
        },
        histograms={
            "words": histograms({split: text.num_words for split, text in texts.items()}),
            "tokens": histograms(tokens),
        },
        share_in_window=float(np.mean(np.asarray(tokens["train"]) <= config.data.seq_len)),
        tokenizer=f"a vocabulary of {len(tokenizer):,}"
        if trained
        else Path(config.tokenizer.pretrained or "").name,
        openings=texts["train"].top_openings(_NUM_LISTED),
        num_openings=len(texts["train"].openings),
        names=texts["train"].top_names(count_lower_words(chunks), _NUM_LISTED),
        growth=texts["train"].growth,
        frequent_share=texts["train"].share_of_frequent_words(),
        vocabularies=vocabularies,
        choice=describe_choice(vocabularies),
        cleaning=None if is_builtin else find_faults(raw, sample(), num_sampled),
        repeated=None if is_builtin else find_repeated(raw, read_split),
    )


def _count_chunks(stories: Iterator[str]) -> dict[str, int]:
    found = count_story_chunks(stories)
    return dict(Counter(stories)) if found is None else found  # a whole story is a chunk, too


def _token_lengths(tokenizer: PreTrainedTokenizerFast, stories: Iterator[str]) -> list[int]:
    """Return the tokens of each story, with the end of text."""
    encoder = StoryEncoder(tokenizer)
    lengths: list[int] = []
    for batch in iter_batches(stories, _BATCH_STORIES):
        ids = encoder.encode(pa.array(batch, pa.string()))
        ends = np.flatnonzero(ids == tokenizer.eos_token_id) + 1
        lengths += np.diff(ends, prepend=0).tolist()
    return lengths


def _is_english(stories: list[str]) -> bool:
    return sum(map(is_not_english, stories)) * 2 < len(stories)
