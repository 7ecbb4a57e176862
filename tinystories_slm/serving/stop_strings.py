"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Text before the first stop string; holds back an end that may be the start of one.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first ends
    the text, and of several that are complete at the same character the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Return the text that can be sent now, and whether a stop string ended it."""
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)[1]], True
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """Return the text that is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a start of `stop`, and not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
