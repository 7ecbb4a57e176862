"""Check an entry of the speedrun: its logs, its test and, if its models are there, their scores.

    python benchmarks/speedrun/verify.py ENTRY [--data PATH] [--rerun SEED]

Exit code 0 if every check passes; else one line that states the first that failed, and 2. `--rerun` trains
one seed again on this machine: its loss must be within the 99% prediction interval of the logged ones.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from speedrun.editions import Edition, load_edition
from speedrun.entry import (
    MAX_P_VALUE,
    MIN_SEEDS,
    Entry,
    SeedLog,
    read_entry,
    read_log,
    student_below,
    summarize,
)
from speedrun.run import run_seed
from speedrun.scoring import score_folder

from tinystories_slm.errors import UserError
from tinystories_slm.model_folder import weights_sha256

# The same weights on another processor: sums in another order.
_SCORE_TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entry", type=Path, help="folder with entry.yaml")
    parser.add_argument("--data", help="copy of the stories of the edition, as data.source")
    parser.add_argument("--rerun", type=int, metavar="SEED", help="train this seed again")
    args = parser.parse_args(argv)
    try:
        verify(args.entry, args.data, args.rerun)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def verify(path: Path, data: str | None = None, rerun: int | None = None) -> Entry:
    """Check an entry, print what was checked, and return it.

    Raises:
        UserError: the first check that failed.
    """
    entry = read_entry(path)
    edition = load_edition(entry.edition)
    if len(entry.seeds) < MIN_SEEDS:
        raise UserError(f"{path}: has {len(entry.seeds)} seeds; the rules need at least {MIN_SEEDS}")
    logs = [read_log(entry.log(seed)) for seed in entry.seeds]
    for seed, log in zip(entry.seeds, logs, strict=True):
        if log.seed != seed:
            raise UserError(f"{entry.log(seed)}: is of seed {log.seed}; run the seed again")
        _check_log(entry, edition, log)
    _check_results(entry, edition, logs)
    print(f"{path}: {len(logs)} logs are consistent; p = {entry.results.p_value:.2g}")
    models = [log for log in logs if entry.model_folder(log.seed).is_dir()]
    for log in models:
        _check_score(entry, edition, log, data)
    print(f"{path}: scores of {len(models)} of {len(logs)} models repeated")
    if rerun is not None:
        _rerun(entry, edition, logs, rerun, data)
    return entry


def _check_log(entry: Entry, edition: Edition, log: SeedLog) -> None:
    name = entry.log(log.seed)
    checks: list[tuple[bool, str]] = [
        (log.sum == log.expected_sum(), "its sum does not match its contents"),
        (log.command == entry.command, "its command is not that of entry.yaml"),
        (log.train_sha256 == edition.train.sha256, "its training text is not that of the edition"),
        (
            log.validation_sha256 == edition.validation.sha256,
            "its validation text is not that of the edition",
        ),
        (dict(log.files) == entry.files(), "the files of the entry have changed since"),
        (
            _rise([line[0] for line in log.lines], log.seconds),
            "the times of its lines do not rise to its end",
        ),
        (log.scores["num_stories"] == edition.validation.num_stories, "not all stories are scored"),
        (_are_steps(log), "its steps, tokens and seconds do not rise together"),
    ]
    for passed, problem in checks:
        if not passed:
            raise UserError(f"{name}: {problem}; run the seed again")


def _rise(times: Sequence[float], end: float) -> bool:
    """Whether the times never fall, and are between 0 and `end`."""
    all_times = [0.0, *times, end]
    return all(math.isfinite(one) for one in all_times) and all_times == sorted(all_times)


def _are_steps(log: SeedLog) -> bool:
    """Whether steps and tokens rise, by whole tokens a step, and the seconds are those of the run."""
    before = (0, 0)
    for step, tokens, _ in log.steps:
        if step <= before[0] or tokens <= before[1] or (tokens - before[1]) % (step - before[0]):
            return False
        before = (step, tokens)
    return _rise([row[2] for row in log.steps], log.seconds)


def _check_results(entry: Entry, edition: Edition, logs: Sequence[SeedLog]) -> None:
    found = summarize(edition, logs)
    if entry.results != found:
        raise UserError(
            f"{entry.path}: the results of entry.yaml are not those of its logs, {found}; correct them"
        )
    if found.p_value >= MAX_P_VALUE:
        raise UserError(
            f"{entry.path}: the mean is not below the target of {edition.target:g} with p < {MAX_P_VALUE:g}: "
            f"mean {found.distance:.4f}, p = {found.p_value:.2g}; train longer, or add seeds"
        )


def _check_score(entry: Entry, edition: Edition, log: SeedLog, data: str | None) -> None:
    folder = entry.model_folder(log.seed)
    if weights_sha256(folder) != log.weights_sha256:
        raise UserError(f"{folder}: has other weights than those of the log; run the seed again")
    found, logged = (scores["bits_per_byte"] for scores in (score_folder(folder, edition, data), log.scores))
    if abs(found - logged) > _SCORE_TOLERANCE:
        raise UserError(f"{folder}: scores {found:.5f} bits per byte, and the log has {logged:.5f}")


def _rerun(entry: Entry, edition: Edition, logs: Sequence[SeedLog], seed: int, data: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        again = run_seed(entry, edition, seed, data, Path(folder) / "model")
    values = [edition.distance(log.scores) for log in logs]
    mean, found = statistics.fmean(values), edition.distance(again.scores)
    deviation = statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    print(f"{entry.path}: seed {seed} again: {again.seconds:.1f} s, distance {found:.4f}; mean {mean:.4f}")
    t = (found - mean) / max(deviation, math.ulp(mean))
    if student_below(t, len(values) - 1) > 0.99:
        raise UserError(
            f"{entry.path}: seed {seed} reached {found:.4f} here, outside the 99% limit of a further run; "
            "use a machine like that of the entry"
        )


if __name__ == "__main__":
    main()
