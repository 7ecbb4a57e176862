"""The vocabulary: train a byte-level BPE on the stories, or take an existing tokenizer.

Either way it ends up in `data_dir/tokenizer/`, where `AutoTokenizer.from_pretrained` loads it, with
or without this package, in transformers 4 and 5.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.artifacts import alone_in, finished_folder, sha256_of
from tinystories_slm.data.formats import SEPARATOR
from tinystories_slm.data.hub import model_commit
from tinystories_slm.data.origin import Origin, refuse_other
from tinystories_slm.data.sources import RawStories, download_data, raw_stories
from tinystories_slm.errors import InputError

logger = logging.getLogger(__name__)

END_OF_TEXT = SEPARATOR
"""The one special token of an own vocabulary, id 0: follows each story, and is bos, eos and pad."""

_BATCH_STORIES = 1000
_MEASURED_STORIES = 1000


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord(Origin):
    """`tokenizer/training.json`: what the vocabulary was made of, and how well it fits the stories."""

    pretrained: str | None
    """`tokenizer.pretrained`; where it is set, nothing was trained and the next three are null."""
    requested_vocab_size: int | None
    """`tokenizer.vocab_size`; few stories may fill less."""
    sample_max_stories: int | None
    """`tokenizer.max_stories`."""
    num_stories: int | None
    """Stories trained on."""
    vocab_size: int
    eos_token_id: int
    tokenizer_sha256: str
    """Of tokenizer.json."""
    bytes_per_token: float
    """UTF-8 bytes of the first validation stories over their tokens, `<|endoftext|>` not counted."""

    def tokenizer_differences(self, tokenizer: TokenizerArgs) -> list[str]:
        """How this vocabulary differs from the one that `tokenizer` asks for, one phrase each."""
        there: dict[str, object] = {"pretrained": self.pretrained}
        if self.pretrained is None and tokenizer.pretrained is None:
            there |= {"vocab_size": self.requested_vocab_size, "max_stories": self.sample_max_stories}
        return [
            f"tokenizer.{name} is {value!r} there, {getattr(tokenizer, name)!r} here"
            for name, value in there.items()
            if value != getattr(tokenizer, name)
        ]


def train_tokenizer(data: DataArgs, tokenizer: TokenizerArgs) -> Path:
    """Make `data.data_dir/tokenizer`, downloading the stories first where they are not there yet.

    A vocabulary of the same settings that is there already is left as it is.

    Returns:
        The folder: tokenizer.json, tokenizer_config.json, training.json.

    Raises:
        InputError: the folder holds another vocabulary, or `tokenizer.pretrained` cannot be used.
    """
    folder = data.data_dir / "tokenizer"
    record = folder / "training.json"
    if not record.exists():
        download_data(data)
        with alone_in(data.data_dir):
            if not record.exists():
                _make(data, tokenizer, folder)
                return folder
    found = TokenizerRecord.load(record)
    refuse_other(data.data_dir, found.differences(data))
    refuse_other(
        data.data_dir, found.tokenizer_differences(tokenizer), "its tokenizer folder and manifest.json"
    )
    logger.info("the tokenizer is in %s already", folder)
    return folder


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or a Hub id (at `revision`).

    Code of its own, if it has any, is run with `trust_remote_code` only.

    Raises:
        InputError: it cannot be found or reached, is not a fast one, or has no end-of-text token.
    """
    what = f"tokenizer ({name_or_path})"
    name = str(Path(name_or_path).expanduser())
    options = {} if Path(name).is_dir() else _hub_options(str(name_or_path), revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # whatever transformers, tokenizers or the HTTP library of the day raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
        raise InputError(
            f"{what} cannot be loaded ({reason}); give a folder or Hub id that has one"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{what} has no tokenizer.json, so is not a fast one; choose another")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{what} has no eos token to stand between stories; choose another")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json so that transformers 4 reads them too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # the name that only transformers 5 knows
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Transformers 4 would add token_type_ids, which no model of ours takes.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    for how_it_was_loaded in ("is_local", "local_files_only"):
        settings.pop(how_it_was_loaded, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode_stories(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, whole and without special ids: `<|endoftext|>` in a text is mere letters."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # transformers sets all three anew at each of its own calls
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in encodings]


def vocab_size_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the highest id: `len(tokenizer)`, unless its ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def learn_bpe(stories: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries: `<|endoftext|>` is id 0, every byte has one.

    The same stories give the same vocabulary; memory grows with their distinct words only.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # Without it, bytes that no story holds would vanish from prompts.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_batches(stories), trainer)
    return bpe


def _make(data: DataArgs, args: TokenizerArgs, folder: Path) -> None:
    raw = RawStories.load(data.data_dir / "raw" / "source.json")
    num_stories = None
    if args.pretrained is not None:
        tokenizer = load_tokenizer(args.pretrained)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # to generate in batches
    else:
        total = raw.splits["train"]["num_stories"]
        num_stories = min(args.max_stories, total)
        sample = _evenly_spaced(raw_stories(data.data_dir, "train"), total, num_stories)
        bar = tqdm(sample, desc="tokenizer", total=num_stories, unit=" stories", disable=None)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=learn_bpe(bar, args.vocab_size),
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        )
        if len(tokenizer) < args.vocab_size:
            logger.warning(
                "the stories fill only %d of tokenizer.vocab_size (%d) entries; going on with these",
                len(tokenizer),
                args.vocab_size,
            )
    tokenizer.model_max_length = data.seq_len
    measured = list(islice(raw_stories(data.data_dir, "validation"), _MEASURED_STORIES))
    num_tokens = sum(map(len, encode_stories(tokenizer, measured)))
    with finished_folder(folder) as unfinished:
        save_tokenizer(tokenizer, unfinished)
        TokenizerRecord(
            **raw.origin_fields(),
            pretrained=args.pretrained,
            requested_vocab_size=None if args.pretrained else args.vocab_size,
            sample_max_stories=None if args.pretrained else args.max_stories,
            num_stories=num_stories,
            vocab_size=vocab_size_of(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_sha256=sha256_of(unfinished / "tokenizer.json"),
            bytes_per_token=sum(len(story.encode("utf-8")) for story in measured) / max(num_tokens, 1),
        ).save(unfinished / "training.json")


def _hub_options(name: str, revision: str | None) -> dict[str, object]:
    """How to load `name` from the Hub: at which commit, or from the cache where the Hub is out of reach."""
    try:
        commit = model_commit(name, revision)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"tokenizer ({name}) is neither a folder here nor a repository on the Hub that you may read; "
            "correct tokenizer.pretrained"
        ) from error
    except RevisionNotFoundError:  # to be reported by the loading
        commit = None
    return {"revision": commit} if commit else {"local_files_only": True, "revision": revision or "main"}


def _evenly_spaced(stories: Iterable[str], total: int, wanted: int) -> Iterator[str]:
    """`wanted` of the `total` stories: numbers 0, total / wanted, 2 * total / wanted ..., rounded down."""
    taken = 0
    for number, story in enumerate(stories):
        if taken < wanted and number == taken * total // wanted:
            taken += 1
            yield story


def _batches(stories: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(stories)
    while batch := list(islice(rest, _BATCH_STORIES)):
        yield batch
