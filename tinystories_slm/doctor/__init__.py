"""Checks of a configuration or a model on this machine: does it work, is it correct, and how fast is it?"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from tinystories_slm.config import RunConfig
from tinystories_slm.config.command_args.doctor import DoctorArgs, ModelDoctorArgs, ScaleDoctorArgs
from tinystories_slm.doctor import dry_run, machine, numerics, resources
from tinystories_slm.doctor.diagnostic import Diagnostic, DiagnosticCheck, run_check
from tinystories_slm.doctor.many_gpus import check_scaling
from tinystories_slm.doctor.model_check import check_model
from tinystories_slm.hardware.device import training_device
from tinystories_slm.hardware.malloc import tune_malloc
from tinystories_slm.io.atomic import write_output

__all__ = ["Diagnostic", "DoctorArgs", "ModelDoctorArgs", "ScaleDoctorArgs", "doctor", "run_diagnostics"]

DoctorOptions = DoctorArgs | ModelDoctorArgs | ScaleDoctorArgs


def doctor(args: DoctorOptions) -> None:
    """Print each diagnostic as it arrives, then the number of problems; exit with 1 if there are any."""
    tune_malloc()  # a run does this too, and the checks time its steps
    diagnostics = []
    for diagnostic in _diagnostics(args):
        print(diagnostic, flush=True)
        diagnostics.append(diagnostic)
    num_problems = sum(diagnostic.verdict == "PROBLEM" for diagnostic in diagnostics)
    if args.output is not None:
        result = {"problems": num_problems, "findings": [asdict(diagnostic) for diagnostic in diagnostics]}
        write_output(args.output, json.dumps(result, indent=2) + "\n")
    print(f"{num_problems} problem{'' if num_problems == 1 else 's'}")
    if num_problems:
        sys.exit(1)


def _diagnostics(args: DoctorOptions) -> Iterator[Diagnostic]:
    if isinstance(args, ModelDoctorArgs):
        return check_model(args)
    return check_scaling(args) if isinstance(args, ScaleDoctorArgs) else run_diagnostics(args)


def run_diagnostics(config: RunConfig) -> Iterator[Diagnostic]:
    """Yield every diagnostic of `config` on this machine, the cheap checks first."""
    device = training_device()
    run_precision = numerics.precision_or_fallback(config, device)
    checks: dict[str, DiagnosticCheck] = {
        "packages": machine.check_packages,
        "device": partial(machine.check_device, device),
        "threads": partial(machine.check_threads, device),
        "load": machine.check_load,
        "allocator": machine.check_allocator,
        "run directory": partial(resources.check_run_dir, config),
        "data": partial(resources.check_data, config),
        "disk": partial(resources.check_disk, config, device, run_precision),
        "memory": partial(resources.check_memory, config, device, run_precision),
        "precision": partial(numerics.check_precision, config, device),
        "results": partial(numerics.check_results, config, device, run_precision),
        "attention": partial(numerics.check_attention, config, device, run_precision),
        "torch.compile": partial(numerics.check_compile, config, device, run_precision),
        "learning": partial(dry_run.check_learning, config, device, run_precision),
        "time": partial(dry_run.check_duration, config, device, run_precision),
    }
    for subject, check in checks.items():
        yield from run_check(subject, check)
