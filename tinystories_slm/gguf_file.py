"""GGUF files as models: one file with weights, tokenizer, chat template and, in ours, the training data."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tinystories_slm.errors import UserError

TRAINING_DATA = "tinystories_slm.training_data"
"""Key of the record of the training data, as JSON, in the files that `export --format gguf` writes."""
_READ_FIELDS = ("general.architecture", "gpt2.feed_forward_length", TRAINING_DATA)


def is_gguf_file(path: Path) -> bool:
    """Whether `path` is a regular file whose name ends in .gguf."""
    return path.suffix.lower() == ".gguf" and path.is_file()


@contextmanager
def gguf_source(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the folder and the option with which `from_pretrained` reads the GGUF file `path` and no other.

    The folder is empty: one with several models may have the tokenizer or the stop tokens of another one.

    Raises:
        UserError: the package gguf is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{path} cannot be read: gguf is not installed; pip install 'tinystories_slm[export]'"
        ) from error
    # Its progress bar cannot be disabled.
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        yield folder, {"gguf_file": str(path.resolve())}


@dataclass(frozen=True)
class GgufFacts:
    """Facts of a GGUF file that transformers does not read."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options of `from_pretrained` that the model needs besides the name of the file."""
    training_data: list[dict[str, Any]] | None = None
    """Record of the training data; None without one."""


def read_gguf_facts(path: Path) -> GgufFacts:
    """Return the facts of the GGUF file `path`.

    transformers assumes another order of operations in GPT-2's activation (logits differ by 1e-6) and four
    times its width between the layers of a block, and ignores the biases of a Llama without an error.

    Raises:
        Exception: of many types, if the file is damaged.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    values = {name: part for name, part in reader.fields.items() if name in _READ_FIELDS}
    tensors = {tensor.name for tensor in reader.tensors}
    architecture, options = values["general.architecture"].contents(), {}
    if architecture == "gpt2":
        options["activation_function"] = "gelu_pytorch_tanh"  # llama.cpp has no other one
        options["n_inner"] = int(values["gpt2.feed_forward_length"].contents())
    if architecture == "llama" and "blk.0.attn_q.bias" in tensors:
        options |= {"attention_bias": True, "mlp_bias": "blk.0.ffn_down.bias" in tensors}
    record = values.get(TRAINING_DATA)
    return GgufFacts(options, None if record is None else json.loads(record.contents()))
