"""What a check found."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tinystories_slm.errors import InputError

Verdict = Literal["ok", "note", "slow", "PROBLEM"]

_SUBJECT_WIDTH = 14


@dataclass(frozen=True)
class Finding:
    """One line of the checkup, and the remedy where there is something to mend."""

    subject: str
    """What was looked at, in a word or two."""
    verdict: Verdict
    """`slow`: the run will work and could be faster; `PROBLEM`: it will not work, or not rightly."""
    text: str
    remedy: str | None = None
    """What to type or change."""

    def __str__(self) -> str:
        line = f"{self.verdict:<8} {self.subject:<{_SUBJECT_WIDTH}} {self.text}"
        return line if self.remedy is None else f"{line}\n{'':<{9 + _SUBJECT_WIDTH}} -> {self.remedy}"


Check = Callable[[], Iterable[Finding]]


def examine(subject: str, check: Check) -> Iterator[Finding]:
    """What `check` finds; if it breaks off with an error, that is a finding too."""
    try:
        yield from check()
    except InputError as error:  # says itself what to change
        yield Finding(subject, "PROBLEM", str(error))
    except Exception as error:  # a checkup that dies of what it examines tells nobody anything
        yield Finding(
            subject,
            "PROBLEM",
            f"could not be examined ({first_line(error)})",
            "reinstall (`make clean story`), or report this with the output of `accelerate env`",
        )


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message, cut to a line's length."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
