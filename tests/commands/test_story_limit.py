"""The quickstart reads as many stories of a large source as the run needs."""

import json
from dataclasses import replace

import pytest

from tinystories_slm.commands.story_limit import limit_stories
from tinystories_slm.config import parse_config
from tinystories_slm.data.raw_stories import RawManifest, download_data
from tinystories_slm.errors import UserError


def test_large_source_is_read_as_far_as_the_run_goes(tmp_path):
    source = tmp_path / "stories.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"{number:04d} {'x' * 95}"}) + "\n" for number in range(900))
    )
    flags = ["--data.source", str(source), "--data.data_dir", str(tmp_path / "data")]
    flags += ["--train.warmup_steps", "0", "--train.batch_size", "2", "--data.seq_len", "10"]

    def limit(steps: int, *more: str) -> int | None:
        return limit_stories(parse_config([*flags, "--train.max_steps", str(steps), *more])).data.max_stories

    # 20 tokens a step, 6 bytes each, 100 bytes a story.
    assert [limit(steps) for steps in (1, 5, 100, 749, 751)] == [2, 6, 120, 899, None]
    assert limit(100, "--data.max_stories", "7") == 7
    assert limit(100, "--data.source", "builtin") is None

    config = limit_stories(parse_config([*flags, "--train.max_steps", "100"]))
    counts = RawManifest.load(download_data(config.data) / "source.json").splits
    assert sum(count["num_stories"] for count in counts.values()) == 120
    assert [limit(steps) for steps in (5, 100)] == [120, 120]  # what is prepared suffices
    download_data(replace(config.data, max_stories=limit(200)))  # a longer run: more of them
    counts = RawManifest.load(tmp_path / "data" / "raw" / "source.json").splits
    assert sum(count["num_stories"] for count in counts.values()) == 240
    download_data(config.data)
    source.unlink()
    assert limit(100) == 120  # a finished run generates another text without its source

    download_data(replace(config.data, source="builtin", max_stories=30, data_dir=tmp_path / "other"))
    with pytest.raises(UserError, match="does not exist"):
        limit(100, "--data.data_dir", str(tmp_path / "other"))


def test_all_prepared_stories_stay(tmp_path):
    source = tmp_path / "stories.jsonl"
    source.write_text("".join(json.dumps({"text": f"story {number}"}) + "\n" for number in range(100)))
    flags = ["--data.source", str(source), "--data.data_dir", str(tmp_path / "data")]
    config = parse_config(
        [*flags, "--train.max_steps", "1", "--train.warmup_steps", "0", "--train.batch_size", "1"]
    )
    assert limit_stories(config) == config  # 1,536 bytes are more than there are
    download_data(config.data)
    assert limit_stories(replace(config, data=replace(config.data, seq_len=16))).data.max_stories is None
