"""The result of one check, and the handling of checks that raise."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tinystories_slm.errors import UserError

Verdict = Literal["ok", "note", "slow", "PROBLEM"]

_SUBJECT_WIDTH = 14


@dataclass(frozen=True)
class Diagnostic:
    """One line of the doctor's output, with a remedy if there is something to change."""

    subject: str
    """The part that was checked, in one or two words."""
    verdict: Verdict
    """`slow`: the run works but could be faster; `PROBLEM`: the run fails or computes wrong results."""
    text: str
    remedy: str | None = None
    """A command to run, or a setting to change."""

    def __str__(self) -> str:
        line = f"{self.verdict:<8} {self.subject:<{_SUBJECT_WIDTH}} {self.text}"
        return line if self.remedy is None else f"{line}\n{'':<{9 + _SUBJECT_WIDTH}} -> {self.remedy}"


DiagnosticCheck = Callable[[], Iterable[Diagnostic]]


def run_check(subject: str, check: DiagnosticCheck) -> Iterator[Diagnostic]:
    """Yield the diagnostics of `check`; an exception in it becomes a PROBLEM about `subject`."""
    try:
        yield from check()
    except UserError as error:  # its message names the fix
        yield Diagnostic(subject, "PROBLEM", str(error))
    except Exception as error:  # one broken check must not hide the results of the others
        yield Diagnostic(
            subject,
            "PROBLEM",
            f"the check failed ({describe_error(error)})",
            "reinstall (`make clean story`), or report this with the output of `accelerate env`",
        )


def describe_error(error: BaseException) -> str:
    """Return the error's type and the first line of its message, at most 160 characters of it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
