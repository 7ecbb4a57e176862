"""Packings: the windows of a token file and their order, a function of (seed, step)."""

from tinystories_slm.data.packing.best_fit import BestFitPacking
from tinystories_slm.data.packing.contiguous import ContiguousPacking
from tinystories_slm.data.packing.dataset import (
    IGNORED_LABEL,
    ORDER_VERSION,
    PADDING,
    Batch,
    PackedDataset,
    WindowSource,
)
from tinystories_slm.data.packing.document import DocumentPacking
from tinystories_slm.data.packing.documents import iter_documents
from tinystories_slm.errors import UserError

__all__ = [
    "IGNORED_LABEL",
    "ORDER_VERSION",
    "PACKINGS",
    "PADDING",
    "Batch",
    "BestFitPacking",
    "ContiguousPacking",
    "DocumentPacking",
    "PackedDataset",
    "WindowSource",
    "iter_documents",
    "packing_class",
]

PACKINGS: dict[str, type[PackedDataset]] = {
    "contiguous": ContiguousPacking,
    "document": DocumentPacking,
    "best_fit": BestFitPacking,
}
"""Packings by the name in `data.packing`; docs/extending.md adds one."""


def packing_class(name: str) -> type[PackedDataset]:
    """Return the entry of `PACKINGS`.

    Raises:
        UserError: there is no packing of that name.
    """
    if name not in PACKINGS:
        raise UserError(f"data.packing ({name}): must be one of {', '.join(PACKINGS)}")
    return PACKINGS[name]
