"""Law of the loss: bits per byte of held-out text as a function of model size and training tokens.

    L(N, D) = E + A / N^alpha + B / D^beta

(Hoffmann et al., arXiv 2203.15556), with N the parameters without embeddings and D the training tokens.
law.json holds one law for real stories and one for the built-in corpus, each with intervals, a check on
held-out runs, and the runs that it was fitted to. `python scripts/scaling.py` writes it, and writes such a
file of the user's own runs.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinystories_slm.errors import UserError

LAW_FILE = Path(__file__).parent / "law.json"
BUILTIN, STORIES = "builtin", "stories"
"""Names of the laws in the file."""

REPETITION_EPOCHS = 15.4
"""R*: epochs after which repeated data are worth little more (Muennighoff et al., arXiv 2305.16264)."""


@dataclass(frozen=True)
class Term:
    """A part of the loss that falls with a quantity."""

    factor: float
    exponent: float

    def __call__(self, quantity: float) -> float:
        return self.factor * quantity**-self.exponent


@dataclass(frozen=True)
class LossLaw:
    """Expected loss of a run in bits per byte, with what it was fitted to."""

    irreducible: float
    """E: the loss of infinite size and data; for the built-in corpus its entropy."""
    parameters: Term
    tokens: Term
    relative_error: float
    """Relative standard deviation of a run around the law."""
    vocab_size: int
    bytes_per_token: float
    """Of a text with this vocabulary."""
    parameters_range: tuple[float, float]
    """Smallest and largest N of the runs."""
    tokens_range: tuple[float, float]
    """Smallest and largest D of the runs."""
    repetition_epochs: float
    """R* of `effective_tokens`."""
    provenance: Mapping[str, Any]
    """Date, command, versions and sources of the fit, and the runs as [N, D, bits per byte]."""

    def bits_per_byte(
        self, num_parameters: float, num_tokens: float, unique_tokens: float = math.inf
    ) -> float:
        """Return the expected loss of `num_tokens` training tokens, of which `unique_tokens` differ."""
        useful = effective_tokens(num_tokens, unique_tokens, self.repetition_epochs)
        return self.irreducible + self.parameters(num_parameters) + self.tokens(useful)

    def extrapolation(self, num_parameters: float, num_tokens: float) -> str | None:
        """Return by how much the run is outside the runs of the law, as text; None inside."""
        found = [
            f"{quantity / limits[1]:.1f} times the largest {name}"
            if quantity > limits[1]
            else f"{limits[0] / quantity:.1f} times below the smallest {name}"
            for name, quantity, limits in (
                ("size", num_parameters, self.parameters_range),
                ("number of tokens", num_tokens, self.tokens_range),
            )
            if not limits[0] <= quantity <= limits[1]
        ]
        return " and ".join(found) or None


def effective_tokens(
    num_tokens: float, unique_tokens: float, repetition_epochs: float = REPETITION_EPOCHS
) -> float:
    """Return the number of fresh tokens that are worth `num_tokens` of a corpus of `unique_tokens`.

    Each repetition is worth less than the one before, by exp(-1 / `repetition_epochs`) (Muennighoff et al.,
    arXiv 2305.16264, equation 5).
    """
    repeated = num_tokens / unique_tokens - 1
    if repeated <= 0:
        return num_tokens
    return unique_tokens * (1 + repetition_epochs * (1 - math.exp(-repeated / repetition_epochs)))


def load_law(name: str, path: Path | None = None) -> LossLaw:
    """Return one law of a file; `path` is None for the file of this package.

    Raises:
        UserError: the file cannot be read, is of another form, or has no such law.
    """
    laws = load_laws(path or LAW_FILE)
    if name not in laws:
        data = "the built-in corpus" if name == BUILTIN else "real stories"
        raise UserError(
            f"law ({path}): has no law of {data}, only {', '.join(laws)}; fit one with scripts/scaling.py"
        )
    return laws[name]


def load_laws(path: Path = LAW_FILE) -> dict[str, LossLaw]:
    """Return the laws in a file by name.

    Raises:
        UserError: the file cannot be read, or is of another form.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return {name: _law_of(record) for name, record in records.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"law ({path}): is not a file of laws ({error}); write it with scripts/scaling.py"
        ) from error


def _law_of(record: Mapping[str, Any]) -> LossLaw:
    terms = {
        name: Term(*(record["terms"][name][constant]["value"] for constant in ("factor", "exponent")))
        for name in ("parameters", "tokens")
    }
    ranges = {f"{name}_range": tuple(map(float, record[f"{name}_range"])) for name in terms}
    names = ("relative_error", "vocab_size", "bytes_per_token", "provenance")
    return LossLaw(
        irreducible=record["irreducible"]["value"],
        repetition_epochs=record["repetition_epochs"]["value"],
        **terms,
        **ranges,
        **{name: record[name] for name in names},
    )
