"""Format `llama2c`; with the source of llama2.c's run.c, also that program itself.

`LLAMA2C=FOLDER` names the folder of run.c; without it, `.cache/llama2.c` is used.
"""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, tiny_model
from transformers import AutoTokenizer

from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.errors import UserError
from tinystories_slm.export import ExportArgs, ExportError, export
from tinystories_slm.export import llama2c as llama2c_export
from tinystories_slm.export.checks import greedy_ids
from tinystories_slm.export.llama2c_reader import Llama2cReader
from tinystories_slm.model_folder import load_model_folder, save_model_folder

VOCAB_SIZE = 300
STORIES = [
    "Once upon a time, there was a little fox. He lived in a hole with his mom.",
    "Lily's cat said: \"Don't go!\" 3 times. Then it went home, and everyone was happy.",
]
SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "grouped queries": {"num_key_value_heads": 2},
}
START = 3 + 0xFF
TEXTS = ["Once upon a time", " Once", "Lily's cat said: \"Don't go!\"", "Zoë saw 🦊", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function from the name of a shape to the folders of a model and of its export."""
    made = {}

    def make(shape: str) -> tuple[Path, Path]:
        if shape not in made:
            folder = tmp_path_factory.mktemp("llama2c")
            tokenizer = train_story_tokenizer(STORIES * 5, VOCAB_SIZE)
            model = tiny_model(vocab_size=VOCAB_SIZE, family="llama", **SHAPES[shape])
            save_model_folder(model, tokenizer, folder / "best")
            args = ExportArgs(model=str(folder / "best"), format="llama2c", output=folder / "out")
            made[shape] = folder / "best", export(args)
        return made[shape]

    return make


def our_ids(tokenizer, reader: Llama2cReader, ids: list[int]) -> list[int]:
    """Translate ids of `run` by the texts of their tokens."""
    by_text = {text: id_ for id_, text in llama2c_export.token_bytes(tokenizer).items()}
    by_text |= {reader.texts[START]: 0, b"<0x00>": by_text[b"\0"]}
    return [by_text[reader.texts[id_]] for id_ in ids]


@pytest.mark.parametrize("shape", SHAPES)
def test_files_have_the_layout_of_version_0(shape, folders):
    best, out = folders(shape)
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.bin", "tokenizer.bin"]
    [check] = json.loads((out / "export.json").read_text())["checks"]
    assert check["greedy_match"] and 0 < check["max_difference"] <= check["max_allowed"] < 1e-3

    model, tokenizer = load_model_folder(str(best), device="cpu")
    kv_heads = SHAPES[shape].get("num_key_value_heads", 4)
    numbers = np.fromfile(out / "model.bin", "<f4")
    assert numbers[:7].view("<i4").tolist() == [32, 96, 2, 4, kv_heads, -VOCAB_SIZE, 48]
    embedding = numbers[7 : 7 + VOCAB_SIZE * 32].reshape(-1, 32)
    head = numbers[-VOCAB_SIZE * 32 :].reshape(-1, 32)
    assert numbers.size == 7 + sum(p.numel() for p in model.parameters()) + 48 * 8 + (
        0 if shape == "untied" else VOCAB_SIZE * 32
    )
    end, letter, last_byte = 0, tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids("ÿ")
    wanted, wanted_head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    assert np.array_equal(embedding[[1, START, 3 + ord("a")]], wanted[[end, end, letter]])
    assert np.array_equal(head[[1, START, 3 + ord("a")]], wanted_head[[end, last_byte, letter]])
    cosines, sines = numbers[-VOCAB_SIZE * 32 - 48 * 8 : -VOCAB_SIZE * 32].reshape(2, 48, 4)
    assert np.allclose(cosines, np.cos(np.arange(48)[:, None] / 10_000 ** (np.arange(4) / 4)), atol=1e-6)
    assert np.allclose(cosines**2 + sines**2, 1, atol=1e-6)


def test_tokenizer_file_has_every_token_once(folders):
    best, out = folders("tied")
    tokenizer, data = AutoTokenizer.from_pretrained(best), (out / "tokenizer.bin").read_bytes()
    reader = Llama2cReader(out)
    texts = reader.texts
    assert struct.unpack_from("<ifi", data)[::2] == (max(map(len, texts)), len(texts[0]))
    assert len(texts) == len(set(texts)) == VOCAB_SIZE and b"" not in texts
    assert texts[1] == b"<|endoftext|>" and texts[START] == b"<|endoftext|> "
    assert texts[3 : 3 + 0xFF] == [b"<0x00>", *(bytes([byte]) for byte in range(1, 0xFF))]
    assert sorted(our_ids(tokenizer, reader, list(range(VOCAB_SIZE)))) == sorted(
        [0, *(set(range(VOCAB_SIZE)) - {tokenizer.convert_tokens_to_ids("ÿ")})]
    )


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_reader_encodes_as_our_tokenizer_after_the_start(text, folders):
    best, out = folders("tied")
    reader, tokenizer = Llama2cReader(out), AutoTokenizer.from_pretrained(best)
    ids = reader.encode(text)
    assert ids[0] == START
    assert our_ids(tokenizer, reader, ids) == tokenizer(text).input_ids
    assert reader.encode("") == [1]


@pytest.mark.parametrize("fault", ["rows", "order", "score"])
def test_export_detects_faults(fault, folders, tmp_path, monkeypatch):
    if fault == "rows":
        monkeypatch.setattr(llama2c_export, "rope_halves_to_pairs", lambda rows, num_heads: rows)
        message = r"largest logits difference \d"
    elif fault == "order":
        original = llama2c_export._rope_tables
        monkeypatch.setattr(llama2c_export, "_rope_tables", lambda config: original(config) * 2)
        message = r"model\.bin: \d+ numbers, but its header states \d+"
    else:
        original_vocabulary = llama2c_export._permute_vocabulary

        def without_start(*args):
            vocabulary = original_vocabulary(*args)
            vocabulary.texts[START] = b"never"
            return vocabulary

        monkeypatch.setattr(llama2c_export, "_permute_vocabulary", without_start)
        message = "'Once upon a time' is tokenized as"
    best, _ = folders("tied")
    with pytest.raises(ExportError, match=message):
        export(ExportArgs(model=str(best), format="llama2c", output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FAMILIES["gpt2"], r"model\.family \(gpt2\): must be llama for llama2\.c"),
        (FAMILIES["llama, qk_norm, untied"], r"model\.qk_norm \(True\): must be False"),
        ({"family": "llama", "bias": True}, r"model\.bias \(True\): must be False"),
        ({"family": "llama", "rope_theta": 5e4}, r"model\.rope_theta \(50000\.0\): must be 10000\.0"),
        ({"family": "llama", "hidden_act": "relu2"}, r"model\.hidden_act \(relu2\): must be silu"),
        ({"family": "llama", "head_dim": 16}, r"model\.head_dim \(16\): must be 8"),
        ({"family": "llama", "norm_eps": 1e-6}, r"model\.norm_eps \(1e-06\): must be 1e-05"),
    ],
)
def test_export_rejects_what_run_does_not_compute(settings, message, tmp_path):
    tokenizer = train_story_tokenizer(STORIES * 5, VOCAB_SIZE)
    save_model_folder(tiny_model(vocab_size=VOCAB_SIZE, **settings), tokenizer, tmp_path / "best")
    with pytest.raises(UserError, match=message):
        export(ExportArgs(model=str(tmp_path / "best"), format="llama2c", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_export_rejects_a_vocabulary_without_room_for_special_tokens(tmp_path):
    tokenizer = train_story_tokenizer(STORIES, 258)
    save_model_folder(tiny_model(vocab_size=258, family="llama"), tokenizer, tmp_path / "best")
    with pytest.raises(UserError, match=r"vocab_size \(258\): must be at least 259"):
        export(ExportArgs(model=str(tmp_path / "best"), format="llama2c", output=tmp_path / "out"))


# A main function for the unchanged source: the ids of a prompt, then their logits.
DRIVER = """
#define TESTING
#include "run.c"
int main(int argc, char *argv[]) {
    Transformer transformer; Tokenizer tokenizer; int num_ids;
    build_transformer(&transformer, argv[1]);
    build_tokenizer(&tokenizer, argv[2], transformer.config.vocab_size);
    int *ids = malloc((strlen(argv[3]) + 3) * sizeof(int));
    encode(&tokenizer, argv[3], 1, 0, ids, &num_ids);
    for (int i = 0; i < num_ids; i++) {
        float *logits = forward(&transformer, ids[i], i);
        printf("%d", ids[i]);
        for (int j = 0; j < transformer.config.vocab_size; j++) { printf(" %.9g", logits[j]); }
        printf("\\n");
    }
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> tuple[Path, Path]:
    """Compile `run` and the driver."""
    source = Path(os.environ.get("LLAMA2C", ROOT / ".cache" / "llama2.c")).absolute() / "run.c"
    if not source.is_file():
        pytest.skip("no source of llama2.c; set LLAMA2C to a clone of github.com/karpathy/llama2.c")
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("programs")
    (folder / "driver.c").write_text(DRIVER)
    for name, path in (("run", source), ("driver", folder / "driver.c")):
        command = [compiler, "-O2", f"-I{source.parent}", "-o", folder / name, path, "-lm"]
        subprocess.run(command, check=True)
    return folder / "run", folder / "driver"


@pytest.mark.compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_run_has_our_ids_logits_and_story(shape, folders, programs):
    run, driver = programs
    best, out = folders(shape)
    (model, tokenizer), reader = load_model_folder(str(best), device="cpu"), Llama2cReader(out)
    files = [out / "model.bin", out / "tokenizer.bin"]
    shared = [id_ for id_ in range(VOCAB_SIZE) if id_ != START]
    for text in TEXTS:
        printed = subprocess.run([driver, *files, text], check=True, capture_output=True, text=True).stdout
        rows = np.array([line.split() for line in printed.splitlines()], dtype=np.float64)
        ids = rows[:, 0].astype(int).tolist()
        assert ids == reader.encode(text)
        with torch.no_grad():
            logits = model(torch.tensor([our_ids(tokenizer, reader, ids)])).logits[0].numpy()
        found, expected = rows[:, 1:][:, shared], logits[:, our_ids(tokenizer, reader, shared)]
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()

    command = [run, files[0], "-z", files[1], "-t", "0", "-n", "47", "-i", TEXTS[0]]
    printed = subprocess.run(command, check=True, capture_output=True).stdout
    story = greedy_ids(model, tokenizer(TEXTS[0]).input_ids, 48)
    texts = llama2c_export.token_bytes(tokenizer)
    assert len(story) > 20
    assert printed == printed_by_run([texts[id_] for id_ in story if id_ != 0]) + b"\n"


def printed_by_run(pieces: list[bytes]) -> bytes:
    """Join `pieces` without single bytes that are not printable in ASCII, which `run` skips."""
    printable = (bytes([byte]) for byte in (*range(0x20, 0x7F), *b"\t\n\v\f\r"))
    kept = {*printable, *(piece for piece in pieces if len(piece) > 1)}
    return b"".join(piece for piece in pieces if piece in kept)
