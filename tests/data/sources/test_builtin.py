"""Built-in blocks: deterministic, and each prompt is true of its story."""

import re
from collections import Counter
from hashlib import sha256

from tinystories_slm import grammar
from tinystories_slm.config import DataArgs
from tinystories_slm.data.filters.cleaning import Cleaner
from tinystories_slm.data.instruct import FEATURES, format_block, parse_block
from tinystories_slm.data.raw_stories import RawManifest, download_data, iter_raw_stories
from tinystories_slm.data.sources.builtin import generate_block
from tinystories_slm.data.sources.registry import find_recorded_source, find_source

BLOCKS = [generate_block(0, index) for index in range(2000)]


def test_prompts_are_true_of_their_stories():
    parts = Counter()
    for index, block in enumerate(BLOCKS):
        story = grammar.generate_story(0, index)
        assert block.story == story.text
        assert len(set(block.words)) in (0, 3)
        assert all(re.search(rf"\b{word}\b", story.text) for word in block.words)
        assert set(block.features) <= set(story.features) & set(FEATURES)
        assert block.summary in (None, story.summary)
        assert (block.random_sentence or "") in story.text
        parts.update(name for name, value in vars(block).items() if value)
    # 2,000 draws with probability 1/2: a standard deviation is 22.
    assert parts.pop("story") == 2000
    assert len(parts) == 4 and all(900 < count < 1100 for count in parts.values())
    # Words that are common in the corpus are not worth a prompt.
    assert not {"said", "there", "with"} & {word for block in BLOCKS for word in block.words}


def test_blocks_are_the_same_on_every_machine():
    texts = "".join(map(format_block, BLOCKS[:200]))
    assert (
        sha256(texts.encode()).hexdigest()
        == "8a2e402f8883bbf25539d2e4478dc1dc0b794ec8e9a17441baccd0e9c5f81293"
    )
    assert [parse_block(format_block(block)) for block in BLOCKS] == BLOCKS
    cleaner = Cleaner()
    assert all(cleaner.clean(text) == text for text in map(format_block, BLOCKS[:200]))


def test_builtin_instruct_is_a_source(tmp_path):
    data = DataArgs(source="builtin-instruct", data_dir=tmp_path / "data", max_stories=100)
    manifest = RawManifest.load(download_data(data) / "source.json")
    assert manifest.provenance.revision == f"grammar {grammar.VERSION}, blocks 1"
    stories = {split: list(iter_raw_stories(data.data_dir, split)) for split in ("train", "validation")}
    assert sorted(stories["train"] + stories["validation"]) == sorted(map(format_block, BLOCKS[:100]))
    source = find_source("builtin-instruct")
    assert source.folder_name() == "builtin-instruct" != find_source("./builtin-instruct").folder_name()
    assert not source.is_builtin_corpus  # the entropy of blocks is not known
    assert type(find_recorded_source("builtin-instruct", "grammar 1, blocks 1")) is type(source)
