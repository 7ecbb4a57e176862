"""The published prompts of report cards."""

from functools import cache
from importlib.resources import files

PROMPTS_VERSION = "1"
"""Version of the prompts; cards of different versions cannot be compared."""


@cache
def read_card_prompts() -> tuple[str, ...]:
    """Return the published prompts; each also starts a story of the built-in corpus."""
    name = f"prompts_v{PROMPTS_VERSION}.txt"
    return tuple(files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines())
