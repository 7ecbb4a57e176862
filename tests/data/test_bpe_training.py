"""Training of a vocabulary: tokenizer.json is that of the trainer of `tokenizers`, to the byte."""

import random

import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, trainers

from tinystories_slm import grammar
from tinystories_slm.data import bpe_training
from tinystories_slm.data import tokenizer as tokenizer_module
from tinystories_slm.data.bpe_training import byte_level_bpe, count_chunks, count_pieces, train_on_pieces
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.kernels.encoding import bindings

EOS = "<|endoftext|>"
SPACES = [c for c in map(chr, range(0x110000)) if c.isspace() or c in "\u180e\u200b\u2060\ufeff"]
"""All white space of Unicode, the separators that only Python counts as such, and characters like blanks."""


@pytest.fixture(autouse=True)
def compiler() -> None:
    if bindings.load_counter() is None:
        pytest.skip("needs a C compiler")


def library_tokenizer(texts: list[str], vocab_size: int, min_frequency: int = 0) -> Tokenizer:
    bpe = byte_level_bpe(tokenizer_module.models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def check_equal(texts: list[str], vocab_size: int, min_frequency: int = 0) -> Tokenizer:
    pieces = count_pieces(count_chunks(texts))
    ours = train_on_pieces(pieces, vocab_size, special_token=EOS, min_frequency=min_frequency)
    assert ours.to_str() == library_tokenizer(texts, vocab_size, min_frequency).to_str()
    return ours


@settings(max_examples=150)
@given(
    texts=st.lists(st.text() | st.text("ab' \n") | st.text([*"aé.'s1", *SPACES]), max_size=8),
    vocab_size=st.integers(250, 400),
    min_frequency=st.integers(0, 4),
)
def test_tokenizer_of_any_texts_is_that_of_the_library(texts, vocab_size, min_frequency):
    check_equal(texts, vocab_size, min_frequency)


@pytest.mark.parametrize("seed", range(6))
def test_tokenizer_of_ties_and_repeats_is_that_of_the_library(seed):
    """Few letters: many equal counts, overlapping pairs, and tokens that two pairs give."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abc"[: 1 + seed % 3], k=rng.randrange(1, 20))) for _ in range(300)]
    check_equal([" ".join(rng.choices(words, k=2000))], 900, min_frequency=seed // 3)


def test_chunks_end_at_each_white_space_of_unicode():
    texts = [f"a{x}{y}b{x}1{y}{x}{y}'s" for x in SPACES for y in (" ", "\n", "\u3000", "é", "\x1c", x)]
    texts += [c for c in SPACES] + [f" {c}" for c in SPACES] + [f"{c} " for c in SPACES] + [""]
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in texts:
        expected: dict[str, int] = {}
        for piece, _ in pre_tokenizer.pre_tokenize_str(text):
            expected[piece] = expected.get(piece, 0) + 1
        assert count_pieces(count_chunks([text])) == expected, ascii(text)
    assert count_chunks(["a b\n\nb  b\u3000"]) == {"a": 1, " b": 2, "\n": 2, "b": 1, " ": 1, "\u3000": 1}
    assert count_chunks([]) == count_chunks([""]) == {}
    assert count_chunks(map(str, range(100_000)))["99999"] == 1  # the table grows


def test_tokenizer_of_the_built_in_corpus_is_that_of_the_library(monkeypatch):
    stories = list(grammar.generate_corpus(300))
    for vocab_size in (257, 300, 2000):
        trained = train_bpe(stories, vocab_size).to_str()
        assert trained == library_tokenizer(stories, vocab_size).to_str()
    monkeypatch.setattr(bpe_training, "MAX_WORK", 100)  # the library trains on the counted chunks
    assert train_bpe(stories, 2000).to_str() == trained
    monkeypatch.setattr(bpe_training, "load_counter", lambda: None)  # no compiler
    assert train_bpe(stories, 2000).to_str() == trained


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs the stories in shared/data")
def test_tokenizer_of_real_stories_is_that_of_the_library():
    path = SHARED / "data" / "tinystories" / "validation-00000-of-00001.parquet"
    stories = pq.read_table(path)["text"].to_pylist()
    assert any(not story.isascii() for story in stories)
    check_equal(stories, 700)
    assert check_equal(stories, 30_000).get_vocab_size() < 30_000  # all merges there are


def test_few_distinct_pieces_are_trained_without_the_library(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "train_with_library", lambda *args: pytest.fail("slow"))
    assert train_bpe(["The cat sat. " * 50] * 100, 300).get_vocab_size() == 265
