"""Train a byte-level BPE on counted pieces, with the result of the trainer of `tokenizers`.

That trainer spends nearly all of its time on the counts of the pieces (words with the blank before them):
1.7 of 1.8 s for 17 MB of stories. They have few distinct pieces, which a kernel counts here.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tinystories_slm.data.batches import iter_batches
from tinystories_slm.kernels.encoding.bindings import load_counter

# Pieces whose squared lengths sum to more are left to the trainer of `tokenizers`: Python takes 3 s here.
MAX_WORK = 2**23
_BATCH_TEXTS = 1000

Pair = tuple[int, int]


def byte_level_bpe(model: models.BPE) -> Tokenizer:
    """Return `model` with the pre-tokenization and the decoder of GPT-2."""
    bpe = Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def count_chunks(texts: Iterable[str]) -> dict[str, int] | None:
    """Return the count of each distinct chunk, as `count_pieces` needs them; None without a C compiler."""
    if (counter := load_counter()) is None:
        return None
    for batch in iter_batches(texts, _BATCH_TEXTS):
        counter.add(batch)
    return counter.counts()


def count_pieces(chunks: Mapping[str, int]) -> Counter[str]:
    """Return the count of each distinct piece of the pre-tokenization, one character a byte."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for piece, _ in pre_tokenizer.pre_tokenize_str(chunk):
            pieces[piece] += count
    return pieces


def is_small(pieces: Iterable[str]) -> bool:
    """Whether `train_on_pieces` takes seconds: its time grows with the squared length of distinct pieces."""
    return sum(len(piece) ** 2 for piece in pieces) <= MAX_WORK


def train_on_pieces(
    pieces: Mapping[str, int], vocab_size: int, *, special_token: str, min_frequency: int = 0
) -> Tokenizer:
    """Train a byte-level BPE with at most `vocab_size` entries: id 0 for `special_token`, bytes and merges.

    The tokenizer is that of `BpeTrainer` on the text of the `pieces`, at all of its ties: of the pairs with
    the highest count, the one with the lowest ids is merged, and the count of a merged pair is not reset.
    """
    tokens = [special_token, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = _merge_pairs(pieces, tokens, vocab_size, min_frequency)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = byte_level_bpe(
        models.BPE(vocab=vocabulary, merges=[(tokens[left], tokens[right]) for left, right in merges])
    )
    bpe.add_special_tokens([AddedToken(special_token, special=True)])
    return bpe


def _merge_pairs(
    pieces: Mapping[str, int], tokens: list[str], vocab_size: int, min_frequency: int
) -> list[Pair]:
    """Append merged tokens to `tokens` until it has `vocab_size`, and return the merges in their order."""
    ids = {token: index for index, token in enumerate(tokens)}
    words = [[ids[letter] for letter in piece] for piece in pieces]
    counts = list(pieces.values())
    pair_counts: defaultdict[Pair, int] = defaultdict(int)
    words_of: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            words_of[pair].add(index)
    # Highest count first, then lowest ids. A pair may stand in it twice, with other words.
    queue = [(-pair_counts[pair], pair, found) for pair, found in words_of.items()]
    heapq.heapify(queue)
    merges: dict[Pair, None] = {}
    while queue and len(tokens) < vocab_size:
        negative_count, pair, found = heapq.heappop(queue)
        if -negative_count != pair_counts[pair]:  # it fell since then
            heapq.heappush(queue, (-pair_counts[pair], pair, found))
            continue
        if -negative_count < max(1, min_frequency):
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ids:  # another pair may have given the same token
            ids[token] = len(tokens)
            tokens.append(token)
        merges.pop(pair, None)  # merged again: the last place counts
        merges[pair] = None
        new_words_of: defaultdict[Pair, set[int]] = defaultdict(set)
        for index in found:
            changes = _merge_in_word(words[index], pair, ids[token])
            for changed, sign in changes:
                pair_counts[changed] += sign * counts[index]
                if sign > 0:
                    new_words_of[changed].add(index)
        for new_pair, new_found in new_words_of.items():
            if pair_counts[new_pair] > 0:
                heapq.heappush(queue, (-pair_counts[new_pair], new_pair, new_found))
    return list(merges)


def _merge_in_word(word: list[int], pair: Pair, new: int) -> list[tuple[Pair, int]]:
    """Replace each `pair` in `word`, from the left, and return the pairs that go (-1) and come (1)."""
    left, right = pair
    changes: list[tuple[Pair, int]] = []
    at = 0
    while at + 1 < len(word):
        if word[at] == left and word[at + 1] == right:
            word[at : at + 2] = [new]
            if at > 0:
                changes += (((word[at - 1], left), -1), ((word[at - 1], new), 1))
            if at + 1 < len(word):
                changes += (((right, word[at + 1]), -1), ((new, word[at + 1]), 1))
        at += 1
    return changes
