"""The steps of preparation as commands: download_data, train_tokenizer, prepare_data, data_report."""

from tinystories_slm.commands.source_folders import use_own_folders
from tinystories_slm.config import RunConfig
from tinystories_slm.config.command_args.data import DownloadArgs, PrepareArgs
from tinystories_slm.config.command_args.reports import DataReportArgs
from tinystories_slm.data.prepare import merge_shards, prepare_data, prepare_shard
from tinystories_slm.data.raw_stories import RawManifest, download_data, format_filters
from tinystories_slm.data.sources.named_sets import format_named_sets
from tinystories_slm.data.token_shards import Shard
from tinystories_slm.data.tokenizer import TokenizerManifest, train_tokenizer
from tinystories_slm.data_report.push import push_stories
from tinystories_slm.data_report.report import write_data_report


def run_download(config: DownloadArgs) -> None:
    """Write the stories to `data_dir/raw` and print the counts of each split, or print the named sets."""
    if config.list:
        print(format_named_sets())
        return
    folder = download_data(config.data)
    manifest = RawManifest.load(folder / "source.json")
    for split, counts in manifest.splits.items():
        dropped = counts["num_empty_dropped"] + counts["num_null_dropped"]
        print(
            f"{folder / split}.parquet: {counts['num_stories']:,} stories, "
            f"{counts['num_bytes'] / 1e6:,.1f} MB, {dropped:,} empty ones dropped"
        )
    for line in format_filters(manifest):
        print(line)
    print("next: train_tokenizer with the same options")


def run_train_tokenizer(config: RunConfig) -> None:
    """Write the tokenizer to `data_dir/tokenizer` and print its size and compression."""
    folder = train_tokenizer(config.data, config.tokenizer)
    record = TokenizerManifest.load(folder / "training.json")
    print(f"{folder}: {record.vocab_size:,} entries, {record.bytes_per_token:.2f} bytes of a story per token")
    print("next: prepare_data with the same options")


def run_prepare(config: PrepareArgs) -> None:
    """Write the token files, or one shard of them, to `data_dir` and print the counts of each split."""
    if config.shard is not None:
        _run_shard(config, Shard(*config.rank_and_world))
        return
    if config.merge_shards is not None:
        manifest = merge_shards(config.data, config.tokenizer, config.merge_shards)
    else:
        manifest = prepare_data(config.data, config.tokenizer)
    for split, counts in manifest.splits.items():
        print(
            f"{config.data.data_dir / split}.bin: {counts['num_tokens']:,} tokens ({manifest.token_dtype}) "
            f"of {counts['num_stories']:,} stories"
        )
    print("next: train with the same options")


def _run_shard(config: PrepareArgs, shard: Shard) -> None:
    manifest = prepare_shard(config.data, config.tokenizer, shard)
    if manifest is None:
        print(f"{config.data.data_dir}: the token files are complete; no shard is needed")
        return
    for split, files in manifest.files.items():
        print(
            f"shard {shard}, {split}: {files['num_tokens']:,} tokens ({manifest.token_dtype}) "
            f"of {files['num_stories']:,} stories"
        )
    print(f"next: prepare_data --merge_shards {shard.num_shards} with the same options, after all shards")


def run_data_report(config: DataReportArgs) -> None:
    """Write the report and the card of the stories, print the choice of a vocabulary, and push on request."""
    config = use_own_folders(config)
    folder = config.data.data_dir
    report = write_data_report(config)
    print(report.choice)
    print(f"{folder / 'report.html'} (values: report.json; dataset card: README.md)")
    if config.push is not None:
        push_stories(config, report)
