"""The encoding kernel: its ids are those of the tokenizer, on every text that it does not leave out."""

import random
from itertools import pairwise, product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data import story_encoder
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.tokenizer import encode_stories, train_story_tokenizer
from tinystories_slm.kernels.encoding import bindings
from tinystories_slm.kernels.encoding.bindings import load_encoder

ALPHABET = "abst'reSTREvml  \n\t\r\x0b\x0c\x1c\x1f\x00\x7f09!?.-_<|>~"


@pytest.fixture(scope="module")
def own() -> PreTrainedTokenizerFast:
    return train_story_tokenizer(
        ["He didn't say: they're 10 cats, we've 9! I'm... she'll" + " la" * 99] * 9, 400
    )


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    path = SHARED / "data" / "gpt2" / "tokenizer.json"
    if not path.exists():
        pytest.skip("needs the tokenizer in shared/data")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")


@pytest.fixture(params=["own", "gpt2"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


def check_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    """Compare with the tokenizer, and return the number of texts that the kernel encoded."""
    kernel = load_encoder(tokenizer.backend_tokenizer.to_str())
    if kernel is None:
        pytest.skip("needs a C compiler")
    data = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, data)])
    ids, ends, is_left = kernel.encode(np.frombuffer(b"".join(data) or b"\0", np.uint8), offsets)
    expected = encode_stories(tokenizer, texts)
    for text, (start, end), left, story in zip(texts, pairwise([0, *ends]), is_left, expected, strict=True):
        assert ids[start:end].tolist() == ([] if left else story), text
        assert not left or not text.isascii() or len(text) > 128, text
    return int((~is_left).sum())


def test_ids_of_all_short_texts_are_those_of_the_tokenizer(tokenizer):
    characters = list(map(chr, range(128)))
    texts = [*characters, *map("".join, product(characters, characters))]
    texts += ["".join(text) for text in product(characters, ALPHABET, "a '\n5!")]
    assert check_ids(tokenizer, texts) == len(texts)


def test_ids_of_long_texts_are_those_of_the_tokenizer(tokenizer):
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(200))) for _ in range(3000)]
    texts += ["<|endoftext|>", "a" * 128, " " * 128 + "a", "a<|endoftext|>b", "", "'ll'LL've", "é", "a é"]
    assert check_ids(tokenizer, texts) == len(texts) - 2
    assert (
        check_ids(tokenizer, ["a" * 129, "a" * 100_000, "ok"]) == 1
    )  # merging is quadratic in a word's length
    assert check_ids(tokenizer, []) == 0


@given(texts=st.lists(st.text() | st.text(ALPHABET + "é\u2019", max_size=60), max_size=8))
def test_stories_of_any_text_end_with_the_end_token(own, texts):
    expected = [token for story in encode_stories(own, texts) for token in (*story, own.eos_token_id)]
    encoder = StoryEncoder(own)
    assert encoder.encode(pa.array(texts, pa.string())).tolist() == expected
    assert encoder.encode(pa.array(["x", *texts, "y"], pa.string())[1:-1]).tolist() == expected  # a slice


def test_other_tokenizers_are_not_taken(own):
    def changed(**values: object) -> str:
        tokenizer = Tokenizer.from_str(own.backend_tokenizer.to_str())
        for name, value in values.items():
            setattr(tokenizer, name, value)
        return tokenizer.to_str()

    from tokenizers import AddedToken, normalizers, pre_tokenizers

    assert bindings._is_supported(bindings.json.loads(changed()))
    added = Tokenizer.from_str(changed())
    added.add_tokens([AddedToken("cats")])
    for text in (
        changed(normalizer=normalizers.Lowercase()),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        changed(pre_tokenizer=pre_tokenizers.Whitespace()),
        changed().replace('"dropout":null', '"dropout":0.1'),
        changed().replace('"ignore_merges":false', '"ignore_merges":true'),
        added.to_str(),
    ):
        assert load_encoder(text) is None


def test_kernel_with_other_ids_is_not_used(own, monkeypatch, caplog):
    stories = pa.array(["One day, a cat ran.", "The end."])
    expected = StoryEncoder(own).encode(stories).tolist()
    kernel = load_encoder(own.backend_tokenizer.to_str())
    if kernel is None:
        pytest.skip("needs a C compiler")
    encode = kernel.encode
    monkeypatch.setattr(kernel, "encode", lambda *args: (encode(*args)[0] + 1, *encode(*args)[1:]))
    monkeypatch.setattr(story_encoder, "load_encoder", lambda text: kernel)
    assert StoryEncoder(own).encode(stories).tolist() == expected
    assert "the encoding kernel does not fit this tokenizer" in caplog.text
    monkeypatch.setattr(story_encoder, "load_encoder", lambda text: None)  # no compiler
    assert StoryEncoder(own).encode(stories).tolist() == expected


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs the stories in shared/data")
def test_ids_of_real_stories_are_those_of_the_tokenizer(tokenizer):
    path = SHARED / "data" / "tinystories" / "validation-00000-of-00001.parquet"
    stories = pq.read_table(path)["text"].to_pylist()
    assert check_ids(tokenizer, stories) > 0.95 * len(stories)
