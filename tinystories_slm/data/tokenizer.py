"""Train a byte-level BPE tokenizer on the stories, or use an existing tokenizer.

Both are saved in `data_dir/tokenizer/`. `AutoTokenizer.from_pretrained` loads this folder with or without
this package, in transformers 4 and 5.
"""

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice, pairwise, repeat, takewhile
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.batches import iter_batches
from tinystories_slm.data.bpe_training import (
    byte_level_bpe,
    count_chunks,
    count_pieces,
    is_small,
    train_on_pieces,
)
from tinystories_slm.data.chat_template import set_chat_template
from tinystories_slm.data.provenance import DataManifest, log_rebuild
from tinystories_slm.data.raw_stories import RawManifest, download_data, iter_raw_stories
from tinystories_slm.data.sources.file_formats import END_OF_TEXT, first_line
from tinystories_slm.data.sources.hub import resolve_model_commit
from tinystories_slm.errors import UserError
from tinystories_slm.gguf_file import gguf_source, is_gguf_file
from tinystories_slm.io.atomic import atomic_directory, directory_lock, file_sha256
from tinystories_slm.io.file_errors import check_regular_files, expand_user

logger = logging.getLogger(__name__)

PAD = "<|pad|>"
"""Padding token of the vocabularies that are trained here; it occurs in no training sequence."""
_BATCH_STORIES = 1000
_COMPRESSION_SAMPLE = 1000
# Training is quadratic in the length of a word: 0.007 s for 4,000 letters, 7 s for 100,000.
_MAX_RUN_CHARS = 4096
_RUN = re.compile(r"[^\W_]+|(?:[^\w\s]|_)+|\s+")  # no word of the byte-level BPE is longer than a run


@dataclass(frozen=True, kw_only=True)
class TokenizerManifest(DataManifest):
    """Contents of `tokenizer/training.json`: training data, size and compression of the tokenizer."""

    pretrained: str | None
    """`tokenizer.pretrained`; if it is set, nothing was trained and the next three fields are null."""
    requested_vocab_size: int | None
    """`tokenizer.vocab_size`; with few stories the trained vocabulary may be smaller."""
    sample_max_stories: int | None
    """`tokenizer.max_stories`."""
    num_stories: int | None
    """Number of stories in the training sample."""
    vocab_size: int
    eos_token_id: int
    tokenizer_sha256: str
    """SHA-256 of tokenizer.json."""
    bytes_per_token: float
    """UTF-8 bytes per token of the first 1000 validation stories, without `<|endoftext|>`."""

    def tokenizer_differences(self, tokenizer: TokenizerArgs) -> list[str]:
        """Return one phrase for each difference between this tokenizer and the options `tokenizer`."""
        recorded: dict[str, object] = {"pretrained": self.pretrained}
        if self.pretrained is None and tokenizer.pretrained is None:
            recorded |= {"vocab_size": self.requested_vocab_size, "max_stories": self.sample_max_stories}
        return [
            f"tokenizer.{name} is {value!r} (configured: {getattr(tokenizer, name)!r})"
            for name, value in recorded.items()
            if value != getattr(tokenizer, name)
        ]


def train_tokenizer(data: DataArgs, tokenizer: TokenizerArgs) -> Path:
    """Build `data.data_dir/tokenizer`; first download the stories if they are missing or others.

    An existing tokenizer of the same stories with the same options is kept; another one is replaced, with a
    warning, when the new one is complete.

    Returns:
        The folder with tokenizer.json, tokenizer_config.json and training.json.

    Raises:
        UserError: the stories cannot be downloaded, or `tokenizer.pretrained` cannot be used.
    """
    folder = data.data_dir / "tokenizer"
    if tokenizer_differences(folder, data, tokenizer) != []:
        download_data(data)
        with directory_lock(data.data_dir, option="data.data_dir"):
            differences = tokenizer_differences(folder, data, tokenizer)
            if differences != []:
                if differences:
                    log_rebuild("the tokenizer", data.data_dir, differences)
                _build_tokenizer(data, tokenizer, folder)
                return folder
    logger.info("using the existing tokenizer in %s", folder)
    return folder


def tokenizer_differences(folder: Path, data: DataArgs, args: TokenizerArgs) -> list[str] | None:
    """Return one phrase per difference between the tokenizer in `folder` and the options; None for none."""
    if not (folder / "training.json").exists():
        return None
    if not (folder / "tokenizer.json").exists():
        return [f"{folder / 'tokenizer.json'} is missing"]
    found = TokenizerManifest.load(folder / "training.json")
    check_tokenizer_file(folder)
    return found.provenance.differences(data) + found.tokenizer_differences(args)


def check_tokenizer_file(folder: Path) -> None:
    """Check that `folder/tokenizer.json` is as it was built.

    Raises:
        UserError: it has changed, which is not overwritten.
    """
    path = folder / "tokenizer.json"
    if file_sha256(path) != TokenizerManifest.load(folder / "training.json").tokenizer_sha256:
        raise UserError(
            f"{path} is not the tokenizer that was built there; delete {folder} to build it again, or copy "
            "your own elsewhere and set --tokenizer.pretrained to its folder"
        )


def load_tokenizer(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    requires_eos: bool = True,
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder, of a GGUF file, or of a Hub id (at `revision`).

    Custom code of the repository runs only with `trust_remote_code`.

    Raises:
        UserError: the tokenizer cannot be loaded, is not a fast tokenizer, or has no end-of-text token
            although `requires_eos`.
    """
    label = f"tokenizer ({name_or_path})"
    path = expand_user(name_or_path)
    check_regular_files(path, (".json", ".jinja"))
    if is_gguf_file(path):
        source = gguf_source(path)
    else:
        source = nullcontext((str(path), {} if path.is_dir() else _hub_options(str(name_or_path), revision)))
    with source as (name, options):
        tokenizer = _read_tokenizer(label, name, trust_remote_code=trust_remote_code, **options)
    if not tokenizer.is_fast:
        raise UserError(f"{label} has no tokenizer.json, so it is not a fast tokenizer; use another one")
    if requires_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{label} has no eos token to separate stories; use another one")
    return tokenizer


def _read_tokenizer(label: str, name: str, **options: Any) -> PreTrainedTokenizerFast:
    """Load a tokenizer with `options` of `from_pretrained`, and use each part of it once."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        # It checks no value of tokenizer_config.json until one is used, or written to another folder.
        tokenizer.decode(tokenizer("Once upon a time").input_ids)
        json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode("utf-8")
    except Exception as error:  # transformers, tokenizers and the HTTP library raise many types
        raise UserError(
            f"{label} cannot be loaded ({first_line(error)}); use a folder or Hub id with a tokenizer"
        ) from error
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json in a form that transformers 4 also loads."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # only transformers 5 has this class name
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Otherwise transformers 4 adds token_type_ids, which our models do not accept.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    for loading_option in ("is_local", "local_files_only"):
        config.pop(loading_option, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode_stories(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encode each text without truncation or special ids; `<|endoftext|>` in a text is plain text."""
    with _plain_text(tokenizer) as backend:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def token_character_ends(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return for each text the characters before the end of each token of `encode_stories`.

    A token that is a part of a character ends where the character ends.
    """
    with _plain_text(tokenizer) as backend:
        encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    return [[end for _, end in encoding.offsets] for encoding in encodings]


@contextmanager
def _plain_text(tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokenizer]:
    """Make the backend encode whole texts, and special tokens in them as plain text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # transformers resets all three in each of its own calls
    try:
        yield backend
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens


def count_lost_bytes(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> list[int]:
    """Return per text the UTF-8 bytes of the characters that its `token_ids` do not decode to.

    0 if the text survives the round trip, apart from one blank that some tokenizers add before it. A text
    that changes and keeps all of its characters counts as 1 byte.
    """
    decoded = tokenizer.backend_tokenizer.decode_batch(list(map(list, token_ids)), skip_special_tokens=False)
    return [
        0 if text in (found, found.removeprefix(" ")) else max(1, _bytes_missing(text, found))
        for text, found in zip(texts, decoded, strict=True)
    ]


def _bytes_missing(text: str, found: str) -> int:
    missing = Counter(text) - Counter(found)
    return sum(count * len(character.encode("utf-8")) for character, count in missing.items())


def add_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make `tokenizer` start each text with its eos token, as every text starts in training.

    The post-processor adds it, as in Llama's tokenizer, so `tokenizer(text)` in any library starts right. Ids
    without special tokens, as from `encode_stories`, do not change.
    """
    eos = tokenizer.eos_token
    tokenizer.bos_token = eos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[eos, "$A"],
        pair=[eos, "$A", f"{eos}:1", "$B:1"],
        special_tokens=[(eos, tokenizer.eos_token_id)],
    )


def prepare_for_export(tokenizer: PreTrainedTokenizerFast) -> None:
    """Replace a start token other than that of training, and set a missing unknown token.

    Tokenizers that were prepared here need neither. Folders of commit 461afef may have both: the start token
    of another model (`<s>`), and no unknown token, which converters such as CTranslate2's require.
    """
    eos = tokenizer.eos_token
    tokenizer.unk_token = tokenizer.unk_token or eos
    plain = tokenizer(eos, add_special_tokens=False).input_ids
    if tokenizer(eos).input_ids not in (plain, [tokenizer.eos_token_id, *plain]):
        add_start_token(tokenizer)


def embedding_rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of rows of the embedding table: the highest id plus one; more than the size if ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def train_bpe(stories: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with at most `vocab_size` entries, id 0 for `<|endoftext|>`, and all bytes.

    Training is deterministic. Memory grows only with the number of distinct words. A longer run of letters,
    blanks or other characters counts as several words of 4,096 characters, so that time is linear in the
    text. Ctrl-C raises KeyboardInterrupt at once.
    """
    if (chunks := count_story_chunks(stories)) is not None:
        return train_on_chunks(chunks, vocab_size)
    return train_with_library(chain.from_iterable(map(_cut_long_runs, stories)), vocab_size)


def count_story_chunks(stories: Iterable[str]) -> dict[str, int] | None:
    """Return the counts for `train_on_chunks`; None, and nothing is read, without a C compiler."""
    return count_chunks(chain.from_iterable(map(_cut_long_runs, stories)))


def train_on_chunks(chunks: Mapping[str, int], vocab_size: int) -> Tokenizer:
    """Train as `train_bpe` does on the stories of the `chunks`."""
    pieces = count_pieces(chunks)
    if is_small(pieces):
        return train_on_pieces(pieces, vocab_size, special_token=END_OF_TEXT)
    texts = chain.from_iterable(repeat(chunk, count) for chunk, count in chunks.items())
    return train_with_library(texts, vocab_size)


def train_with_library(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on any texts, with the trainer of `tokenizers`. `train_on_pieces` has the same result."""
    bpe = byte_level_bpe(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # Without this, bytes that occur in no story would be dropped from prompts.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _run_interruptibly(
        lambda stop: bpe.train_from_iterator(
            takewhile(lambda _: not stop(), iter_batches(texts, _BATCH_STORIES)), trainer
        )
    )
    return bpe


def _cut_long_runs(story: str) -> list[str]:
    """Cut `story` so that no run of letters, blanks or other characters exceeds `_MAX_RUN_CHARS`."""
    if len(story) <= _MAX_RUN_CHARS:
        return [story]
    cuts = [
        cut
        for run in _RUN.finditer(story)
        for cut in range(run.start() + _MAX_RUN_CHARS, run.end(), _MAX_RUN_CHARS)
    ]
    return [story[start:end] for start, end in pairwise([0, *cuts, len(story)])]


def _run_interruptibly(work: Callable[[Callable[[], bool]], object]) -> None:
    """Run `work` in a thread and wait for it.

    Python handles no signal while its main thread is in native code.
    `work` receives a function that returns True after an interruption.
    """
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(stop.is_set)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # with a timeout, so that Ctrl-C arrives on Windows as well
    except BaseException:
        stop.set()
        thread.join(1)  # a thread that still needs the interpreter at its exit would abort the process
        raise
    if errors:
        raise errors[0]


def train_story_tokenizer(stories: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BPE of at most `vocab_size` entries, with special tokens and start token.

    The last entry is the padding token `<|pad|>`. It differs from the end token, because the collator of
    transformers ignores labels that equal the padding token: a model fine-tuned with the end token as padding
    forgets to end its texts.
    """
    return as_story_tokenizer(train_bpe(stories, num_bpe_entries(vocab_size)), vocab_size)


def num_bpe_entries(vocab_size: int) -> int:
    """Return the entries of `train_bpe` in a vocabulary of `vocab_size`: all but the padding token.

    The end of text and 256 bytes fill 257 entries, which leave no room for it.
    """
    return vocab_size - (vocab_size > 257)


def as_story_tokenizer(bpe: Tokenizer, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a BPE of `num_bpe_entries(vocab_size)` with special tokens and start token."""
    has_pad = vocab_size > 257
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,  # as in GPT-2: never used, but converters such as CTranslate2's require one
        pad_token=PAD if has_pad else END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    add_start_token(tokenizer)
    return tokenizer


def _build_tokenizer(data: DataArgs, args: TokenizerArgs, folder: Path) -> None:
    """Load or train the tokenizer, measure its compression, and write `folder`."""
    raw = RawManifest.load(data.data_dir / "raw" / "source.json")
    num_stories = None
    if args.pretrained is not None:
        tokenizer = load_tokenizer(args.pretrained)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # batched generation needs one
        tokenizer.unk_token = tokenizer.unk_token or tokenizer.eos_token
        add_start_token(tokenizer)
    else:
        total = raw.splits["train"]["num_stories"]
        num_stories = min(args.max_stories, total)
        sample = stride_sample(iter_raw_stories(data.data_dir, "train"), total, num_stories)
        bar = tqdm(sample, desc="tokenizer", total=num_stories, unit=" stories", disable=None)
        tokenizer = train_story_tokenizer(bar, args.vocab_size)
        if len(tokenizer) < args.vocab_size:
            logger.warning(
                "the stories fill only %d of tokenizer.vocab_size (%d) entries; using the smaller vocabulary",
                len(tokenizer),
                args.vocab_size,
            )
    tokenizer.model_max_length = data.seq_len
    sample_stories = list(islice(iter_raw_stories(data.data_dir, "validation"), _COMPRESSION_SAMPLE))
    set_chat_template(tokenizer, sample_stories)
    sample_ids = encode_stories(tokenizer, sample_stories)
    num_tokens = sum(map(len, sample_ids))
    if any(lost := count_lost_bytes(tokenizer, sample_stories, sample_ids)):
        logger.warning(
            "the tokenizer loses %d bytes of %d in %d of %d validation stories; the model cannot learn them",
            sum(lost),
            sum(len(story.encode("utf-8")) for story in sample_stories),
            sum(map(bool, lost)),
            len(lost),
        )
    with atomic_directory(folder, replace=(folder / "training.json").exists()) as unfinished:
        save_tokenizer(tokenizer, unfinished)
        TokenizerManifest(
            provenance=raw.provenance,
            pretrained=args.pretrained,
            requested_vocab_size=None if args.pretrained else args.vocab_size,
            sample_max_stories=None if args.pretrained else args.max_stories,
            num_stories=num_stories,
            vocab_size=embedding_rows(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_sha256=file_sha256(unfinished / "tokenizer.json"),
            bytes_per_token=sum(len(story.encode("utf-8")) for story in sample_stories) / max(num_tokens, 1),
        ).save(unfinished / "training.json")


def _hub_options(name: str, revision: str | None) -> dict[str, object]:
    """Return loading options for Hub id `name`: the commit, or the cache only if the Hub is unreachable."""
    try:
        commit = resolve_model_commit(name, revision)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"tokenizer ({name}) is neither a local folder nor a repository on the Hub that you can read; "
            "correct tokenizer.pretrained"
        ) from error
    except RevisionNotFoundError:  # from_pretrained reports it
        commit = None
    return {"revision": commit} if commit else {"local_files_only": True, "revision": revision or "main"}


def stride_sample(stories: Iterable[str], total: int, count: int) -> Iterator[str]:
    """Yield `count` of the `total` stories: indices 0, total / count, 2 * total / count ..., rounded down."""
    taken = 0
    for index, story in enumerate(stories):
        if taken < count and index == taken * total // count:
            taken += 1
            yield story
