"""Export format `llama2c`: model.bin and tokenizer.bin for the program `run` of llama2.c.

The format is version 0 of https://github.com/karpathy/llama2.c (commit 350e04f), which ports to small boards
read. `run` has no options for the architecture or the ids of tokens: the ids are permuted, see `_Vocabulary`.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tinystories_slm.errors import UserError
from tinystories_slm.export.byte_level import require_byte_level_bpe, token_bytes
from tinystories_slm.export.checks import (
    DEFAULT_PROMPT,
    EquivalenceCheck,
    ExportError,
    encode_default_prompt,
    greedy_ids,
    probe_ids,
    require_equal,
)
from tinystories_slm.export.llama2c_reader import BOS, FIRST_BYTE, HEADER, MODEL, TOKENIZER, Llama2cReader
from tinystories_slm.export.native import rope_halves_to_pairs
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM

_START_BYTE = 0xFF
"""Byte whose id holds the start of a prompt: it occurs in no UTF-8 text, so the model never generates it."""
_MAX_RELATIVE_DIFFERENCE = 1e-5
_MIN_VOCABULARY = FIRST_BYTE + 256


def export_llama2c(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[EquivalenceCheck]:
    """Write model.bin (float32) and tokenizer.bin to `folder`, and compare what a reader computes from them.

    Raises:
        UserError: `run` does not compute this architecture or this tokenizer.
        ExportError: the files, read again, differ in logits by more than 1e-5 of the largest one, in greedy
            text, or in the ids of the default prompt.
    """
    model = model.float()
    _check_architecture(model.config)
    vocabulary = _permute_vocabulary(tokenizer, model.config.vocab_size)
    _write_model(model, vocabulary, folder / MODEL)
    _write_tokenizer(vocabulary, folder / TOKENIZER)
    return [_compare(model, tokenizer, vocabulary, Llama2cReader(folder))]


def _check_architecture(config: TinyStoriesConfig) -> None:
    computed = {
        "family": "llama",
        "qk_norm": False,
        "bias": False,
        "hidden_act": "silu",
        "norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    for name, value in computed.items():
        found = config.rope_parameters[name] if name == "rope_theta" else getattr(config, name)
        if found != value:
            raise UserError(
                f"model.{name} ({found}): must be {value} for llama2.c, which has no other; train with "
                f"{value}, or use --format gguf"
            )


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens in the order of the ids of `run`.

    `run` starts each prompt with id 1 and a blank, ends a text at id 1, and looks for byte `b` at id `3 + b`.
    Our texts start without a blank. So a token has the joint text of both, with the highest score: `run`
    merges them to it first. It has the id of `_START_BYTE` and the embedding of `<|endoftext|>`. Its row of
    the output head stays that of the byte: otherwise it would be as probable as the end of a text.
    """

    ids: list[int]
    """Our id of each token of `run`."""
    texts: list[bytes]
    """Text of each token of `run`; none is empty, which `run` cannot read."""
    scores: list[float]
    """`run` merges first the pair whose joint text has the highest score."""
    end_id: int
    """Our id of `<|endoftext|>`."""

    @property
    def input_ids(self) -> list[int]:
        """Our ids of the rows of the embedding."""
        return [self.end_id if id_ == self.start_byte_id else id_ for id_ in self.ids]

    @property
    def start_byte_id(self) -> int:
        return self.ids[FIRST_BYTE + _START_BYTE]


def _permute_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> _Vocabulary:
    if vocab_size < _MIN_VOCABULARY:
        raise UserError(
            f"tokenizer.vocab_size ({vocab_size}): must be at least {_MIN_VOCABULARY} for llama2.c, its "
            "256 bytes and 3 special tokens; use --format gguf"
        )
    backend = require_byte_level_bpe(tokenizer, "llama2c")
    text_of = token_bytes(tokenizer)
    added = set(tokenizer.added_tokens_decoder)
    byte_ids = {text: id_ for id_, text in text_of.items() if len(text) == 1 and id_ not in added}
    rank_of = {"".join(pair): rank for rank, pair in enumerate(backend["model"]["merges"])}
    scores = {tokenizer.convert_tokens_to_ids(token): -1.0 - rank for token, rank in rank_of.items()}

    placed = [tokenizer.eos_token_id, *(byte_ids[bytes([byte])] for byte in range(256))]
    others = iter(sorted(set(range(vocab_size)) - set(placed)))
    ids = [next(others), placed[0], next(others), *placed[1:], *others]
    texts = [text_of.get(id_) or f"<unused{id_}>".encode() for id_ in ids]
    texts[FIRST_BYTE] = b"<0x00>"  # a C string ends at this byte
    texts[FIRST_BYTE + _START_BYTE] = texts[BOS] + b" "
    return _Vocabulary(ids, texts, [scores.get(id_, 0.0) for id_ in ids], placed[0])


def _write_model(model: TinyStoriesForCausalLM, vocabulary: _Vocabulary, path: Path) -> None:
    config, base = model.config, model.model
    attention = [layer.self_attn for layer in base.layers]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    arrays = [
        _numpy(base.embed_tokens.weight)[vocabulary.input_ids],
        *(_numpy(layer.input_layernorm.weight) for layer in base.layers),
        *(rope_halves_to_pairs(_numpy(each.q_proj.weight), heads) for each in attention),
        *(rope_halves_to_pairs(_numpy(each.k_proj.weight), kv_heads) for each in attention),
        *(_numpy(each.v_proj.weight) for each in attention),
        *(_numpy(each.o_proj.weight) for each in attention),
        *(_numpy(layer.post_attention_layernorm.weight) for layer in base.layers),
        *(_numpy(layer.mlp.gate_proj.weight) for layer in base.layers),
        *(_numpy(layer.mlp.down_proj.weight) for layer in base.layers),
        *(_numpy(layer.mlp.up_proj.weight) for layer in base.layers),
        _numpy(base.norm.weight),
        *_rope_tables(config),
        _numpy(model.lm_head.weight)[vocabulary.ids],
    ]
    header = HEADER.pack(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        heads,
        kv_heads,
        -config.vocab_size,  # negative: the output head is not the embedding
        config.max_position_embeddings,
    )
    with path.open("wb") as file:
        file.write(header)
        for array in arrays:
            file.write(np.ascontiguousarray(array, "<f4").tobytes())


def _numpy(weight: torch.Tensor) -> NDArray[np.float32]:
    return weight.detach().numpy()


def _rope_tables(config: TinyStoriesConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return cosines and sines (positions, head_dim / 2), which `run` skips and earlier readers use."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    angles = np.arange(config.max_position_embeddings)[:, None] / 10_000.0**exponents
    return np.cos(angles), np.sin(angles)


def _write_tokenizer(vocabulary: _Vocabulary, path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<i", max(map(len, vocabulary.texts))))
        for text, score in zip(vocabulary.texts, vocabulary.scores, strict=True):
            file.write(struct.pack("<fi", score, len(text)) + text)


@torch.no_grad()
def _compare(
    model: TinyStoriesForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: _Vocabulary,
    reader: Llama2cReader,
) -> EquivalenceCheck:
    run_id_of = {id_: position for position, id_ in enumerate(vocabulary.ids)}
    prompt, ids = encode_default_prompt(tokenizer), probe_ids(model, tokenizer)
    expected = [FIRST_BYTE + _START_BYTE, *(run_id_of[id_] for id_ in prompt[1:])]
    if (found := reader.encode(DEFAULT_PROMPT)) != expected:
        raise ExportError(f"llama2.c: {DEFAULT_PROMPT!r} is tokenized as {found}, not as {expected}")

    ids[ids == vocabulary.start_byte_id] = vocabulary.end_id
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits.numpy()[..., vocabulary.ids]
    found_logits = np.stack([reader.logits([run_id_of[id_] for id_ in text]) for text in ids.tolist()])
    suppressed = model.generation_config.suppress_tokens or []
    greedy = reader.greedy_ids(expected, ids.shape[1], {run_id_of[id_] for id_ in suppressed})
    story = greedy_ids(model, prompt, ids.shape[1])
    return require_equal(
        EquivalenceCheck(
            name="llama2.c, float32",
            file=MODEL,
            max_difference=float(np.abs(logits - found_logits).max()),
            max_allowed=_MAX_RELATIVE_DIFFERENCE * float(np.abs(logits).max()),
            greedy_match=[vocabulary.ids[id_] for id_ in greedy[1:]] == story[1:],
        )
    )
