"""Make an entry of the speedrun: run each seed without the validation text, time it, score it, log it.

    python benchmarks/speedrun/run.py ENTRY [--data PATH] [--only SEED]

The rules are in README.md. Each seed runs in a new folder with train.jsonl and the files of the entry, in a
process that can read nothing else (isolation.py), on two cores or one GPU. The validation text is read when
the process has ended.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import ROOT, ProcessResult, git_revision, machine, run_process, versions
from speedrun import isolation
from speedrun.editions import Edition, json_lines, load_edition
from speedrun.entry import Entry, SeedLog, read_entry, read_log, summarize, write_entry
from speedrun.scoring import score_folder

from tinystories_slm.errors import UserError
from tinystories_slm.model_folder import weights_sha256
from tinystories_slm.runs.records import read_metrics

TRAIN_FILE = "train.jsonl"
NUM_CORES = 2
CODE = ("tinystories_slm", "configs", "constraints.txt", "model_card.md")
"""Files of this checkout that a command may read; data/ and runs/ are not among them."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entry", type=Path, help="folder with entry.yaml")
    parser.add_argument("--data", help="copy of the stories of the edition, as data.source")
    parser.add_argument("--only", type=int, help="run this seed alone; the other logs stay")
    args = parser.parse_args(argv)
    try:
        make_entry(args.entry, args.data, args.only)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def make_entry(path: Path, data: str | None, only: int | None = None) -> Entry:
    """Run the seeds of an entry, and write its logs, models, date, hardware, commit and results.

    Raises:
        UserError: the entry or the text is invalid, a run failed, or this system cannot isolate it.
    """
    entry = read_entry(path)
    edition = load_edition(entry.edition)
    if only is not None and only not in entry.seeds:
        raise UserError(f"only ({only}): must be one of the seeds {entry.seeds} of the entry")
    for seed in entry.seeds if only is None else [only]:
        print(f"{entry.name}: seed {seed}", file=sys.stderr, flush=True)
        log = run_seed(entry, edition, seed, data, entry.model_folder(seed))
        log.write(entry.log(seed))
        print(f"{log.seconds:.1f} s, {log.scores['bits_per_byte']:.4f} bits per byte", flush=True)
    logs = [read_log(entry.log(seed)) for seed in entry.seeds if entry.log(seed).is_file()]
    about = logs[0].machine
    entry = replace(
        entry,
        date=datetime.now(UTC).date().isoformat(),
        hardware=f"{NUM_CORES} cores of {about['processor']}"
        if entry.device == "cpu"
        else about["accelerator"],
        commit=logs[0].commit,
        results=summarize(edition, logs),
    )
    write_entry(entry)
    results = entry.results
    print(
        f"{len(logs)} seeds: {results.seconds:.1f} s, {results.bits_per_byte:.4f} bits per byte; "
        f"p = {results.p_value:.2g} that the mean is not below the target"
    )
    return entry


def run_seed(entry: Entry, edition: Edition, seed: int, data: str | None, model_folder: Path) -> SeedLog:
    """Run the command of an entry with a seed, move its model to `model_folder`, and return the log.

    Raises:
        UserError: the run failed or wrote no model, or the model cannot be scored.
    """
    if not isolation.landlock_version():
        raise UserError(
            "speedrun: needs Linux 5.13 or later with Landlock, to hide the validation text; use one"
        )
    stories = edition.read_stories("train", data)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file in entry.files():
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry.path / file, work / file)
        (work / TRAIN_FILE).write_bytes(json_lines(stories))
        done = _run_isolated(entry, seed, work)
        trained = _written_by_run(work, "model", entry.model)
        if not trained.is_dir():
            raise UserError(f"model ({entry.model}): the command wrote no such folder; correct entry.yaml")
        steps = read_metrics(_written_by_run(work, "metrics", entry.metrics)) if entry.metrics else []
        shutil.rmtree(model_folder, ignore_errors=True)
        shutil.copytree(trained, model_folder)
    return SeedLog(
        seed=seed,
        command=entry.command,
        commit=git_revision(ROOT),
        machine=machine(),
        versions=versions(),
        train_sha256=edition.train.sha256,
        validation_sha256=edition.validation.sha256,
        files=entry.files(),
        seconds=round(done.seconds, 3),
        steps=[[one["step"], one["tokens"], one["seconds"]] for one in steps if "seconds" in one],
        lines=[[round(line.seconds, 3), _without_paths(line.text, work)] for line in done.lines],
        weights_sha256=weights_sha256(model_folder),
        scores=score_folder(model_folder, edition, data),
    )


def _written_by_run(work: Path, option: str, name: str) -> Path:
    """Return the path `name` in the folder of a run.

    Raises:
        UserError: it, or a file in it, is elsewhere or a link to elsewhere, which the run could not read.
    """
    path, inside = work / name, work.resolve()
    for one in (path, *path.rglob("*")):
        if not one.resolve().is_relative_to(inside):
            raise UserError(f"{option} ({name}): {one.name} is outside the folder of the run; copy it there")
    return path


def _run_isolated(entry: Entry, seed: int, work: Path) -> ProcessResult:
    words = [str(seed) if word == "SEED" else word for word in shlex.split(entry.command)]
    words[0] = sys.executable if words[0] == "python" else words[0]
    readable = [sys.prefix, sys.base_prefix, f"{ROOT}/.", *(str(ROOT / name) for name in CODE)]
    launcher = [sys.executable, "-I", "-S", str(Path(isolation.__file__).resolve())]
    allowed = os.sched_getaffinity(0)
    if entry.device == "cpu":
        os.sched_setaffinity(0, sorted(allowed)[:NUM_CORES])
    try:
        return run_process([*launcher, str(work), *readable, "--", *words], cwd=work)
    except RuntimeError as error:
        last = str(error).splitlines()[-1]
        raise UserError(f"command ({entry.command}): failed with seed {seed}: {last}") from error
    finally:
        os.sched_setaffinity(0, allowed)


def _without_paths(text: str, work: Path) -> str:
    return text.replace(str(work), ".").replace(str(ROOT), "REPOSITORY")


if __name__ == "__main__":
    main()
