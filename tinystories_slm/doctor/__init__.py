"""A checkup: will this configuration train on this machine, rightly, and how fast?"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tinystories_slm.config import RunConfig
from tinystories_slm.doctor import arithmetic, machine, needs, trial
from tinystories_slm.doctor.finding import Check, Finding, examine
from tinystories_slm.doctor.model_check import ModelDoctorArgs, check_model

__all__ = ["DoctorArgs", "Finding", "ModelDoctorArgs", "checkup", "doctor", "doctor_args"]


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(RunConfig):
    """A configuration to examine on this machine; nothing is trained, downloaded or written.

    With `--model M` (a folder or Hub id) and no configuration, the model is examined instead. The exit code
    is 0 without problems, 1 with problems, 2 for a configuration that cannot be right.
    """

    output: Path | None = None
    """File for the findings as JSON; null for none."""


def doctor_args(argv: Sequence[str]) -> type[DoctorArgs] | type[ModelDoctorArgs]:
    """The options that a command line is for: `--model M` names a model, `--model.lr` belongs to a run."""
    names_model = any(arg == "--model" or arg.startswith("--model=") for arg in argv)
    return ModelDoctorArgs if names_model else DoctorArgs


def doctor(args: DoctorArgs | ModelDoctorArgs) -> None:
    """Print every finding as soon as it is made, then their number; exit with 1 if there are problems."""
    findings = []
    for finding in check_model(args) if isinstance(args, ModelDoctorArgs) else checkup(args):
        print(finding, flush=True)
        findings.append(finding)
    num_problems = sum(finding.verdict == "PROBLEM" for finding in findings)
    print(f"{num_problems} problem{'' if num_problems == 1 else 's'}")
    if args.output is not None:
        plain = {"problems": num_problems, "findings": [asdict(finding) for finding in findings]}
        args.output.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    if num_problems:
        sys.exit(1)


def checkup(config: RunConfig) -> Iterator[Finding]:
    """Every finding about `config` on this machine, the cheap ones first."""
    device = machine.training_device()
    run_precision = arithmetic.resolved_precision(config, device)
    checks: dict[str, Check] = {
        "packages": machine.packages,
        "device": partial(machine.devices, device),
        "threads": partial(machine.threads, device),
        "load": machine.load,
        "allocator": machine.allocator,
        "run folder": partial(needs.run_folder, config),
        "data": partial(needs.data, config),
        "disk": partial(needs.disk, config),
        "memory": partial(needs.memory, config, device, run_precision),
        "precision": partial(arithmetic.precision, config, device),
        "attention": partial(arithmetic.attention, config, device, run_precision),
        "torch.compile": partial(arithmetic.compilation, config, device, run_precision),
        "learning": partial(trial.overfit, config, device, run_precision),
        "time": partial(trial.duration, config, device, run_precision),
    }
    for subject, check in checks.items():
        yield from examine(subject, check)
