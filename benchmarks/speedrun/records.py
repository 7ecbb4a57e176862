"""Write RECORDS.md and records.png from the entries: a table for each edition, and the record over time.

python benchmarks/speedrun/records.py
"""

import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import line_chart, markdown_table
from speedrun.editions import FOLDER as EDITIONS
from speedrun.editions import Edition, load_edition
from speedrun.entry import ENTRY_FILE, Entry, read_entry

FOLDER = Path(__file__).parent
_COLUMNS = ("date", "seconds", "bits per byte", "distance", "seeds", "p", "entry", "author", "hardware")


def main() -> None:
    entries = read_entries(FOLDER / "entries")
    (FOLDER / "RECORDS.md").write_text(format_page(entries), encoding="utf-8")
    if entries:
        draw(entries, FOLDER / "records.png")


def read_entries(folder: Path) -> list[Entry]:
    """Return the finished entries, the earliest first."""
    found = [read_entry(path.parent) for path in folder.glob(f"*/{ENTRY_FILE}")]
    return sorted((one for one in found if one.results), key=lambda one: (one.date, -one.results.seconds))


def format_page(entries: Sequence[Entry]) -> str:
    """Return the page of records."""
    parts = [
        "# Records\n",
        "Written by `python benchmarks/speedrun/records.py`; the rules are in [README.md](README.md).\n",
    ]
    if entries:
        parts.append("![Seconds of the entries over time](records.png)\n")
    for path in sorted(EDITIONS.glob("*.yaml")):
        edition = load_edition(path.stem)
        own = sorted(
            (one for one in entries if one.edition == edition.name), key=lambda one: one.results.seconds
        )
        parts.append(f"## {edition.name}\n\nTarget: {describe_target(edition)}.\n")
        parts.append(markdown_table(_COLUMNS, [_row(one) for one in own]) if own else "No entry yet.\n")
    return "\n".join(parts)


def describe_target(edition: Edition) -> str:
    """Return the target as a phrase."""
    above = " above the entropy of the text" if edition.above_entropy else ""
    return f"{edition.target:g} bits per byte{above}"


def _row(entry: Entry) -> list[str]:
    results = entry.results
    return [
        entry.date,
        f"{results.seconds:.1f}",
        f"{results.bits_per_byte:.4f}",
        f"{results.distance:.4f}",
        str(len(entry.seeds)),
        f"{results.p_value:.1g}",
        f"[{entry.name}](entries/{entry.path.name}/{ENTRY_FILE})",
        entry.author,
        entry.hardware,
    ]


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Chart the seconds of each entry over its date, and the record of each edition and device as steps."""
    with line_chart(path, xlabel="date", ylabel="seconds") as axes:
        for edition, device in sorted({(one.edition, one.device) for one in entries}):
            own = [one for one in entries if (one.edition, one.device) == (edition, device)]
            dates = [date.fromisoformat(one.date) for one in own]
            seconds = [one.results.seconds for one in own]
            best = [min(seconds[: index + 1]) for index in range(len(seconds))]
            [line] = axes.step(dates, best, where="post", label=f"{edition}, {device}")
            axes.plot(dates, seconds, "o", color=line.get_color())
        axes.set_ylim(bottom=0)
        axes.figure.autofmt_xdate()


if __name__ == "__main__":
    main()
