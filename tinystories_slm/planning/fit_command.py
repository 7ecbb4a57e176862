"""The scaling command: run or read a sweep, fit the law of its losses, check it, and write law.json."""

import json
import logging
import shlex
from dataclasses import fields

from tinystories_slm.config import parse
from tinystories_slm.config.command_args.scaling import ScalingArgs
from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import write_output
from tinystories_slm.io.file_errors import translate_write_errors
from tinystories_slm.planning.fit import ScalingFit, fit_scaling
from tinystories_slm.planning.fit_report import describe_fit, law_record, plot_fits
from tinystories_slm.planning.law import load_laws
from tinystories_slm.planning.measured_runs import describe_sources, read_runs
from tinystories_slm.power_law import UndeterminedLawError
from tinystories_slm.runs.run_dir import read_json_object
from tinystories_slm.sweeps.sweep import sweep

logger = logging.getLogger(__name__)


def fit_laws(args: ScalingArgs) -> dict[str, ScalingFit]:
    """Fit a law to the runs of real stories, and one to those of the built-in corpus, and write them.

    A law of the same name in `args.output` is replaced; others stay.

    Raises:
        UserError: the sweep failed, the runs cannot be read or do not determine a law, or a file cannot be
            written.
    """
    records = read_json_object(args.output)
    if records:
        load_laws(args.output)
    paths = args.run_paths
    if args.sweep is not None:
        sweep_args = parse(SweepArgs, ["--config", str(args.sweep)])
        sweep(sweep_args)
        paths = [sweep_args.output_dir, *paths]
    fits = {}
    for name, runs in read_runs(paths).items():
        try:
            fits[name] = fit_scaling(runs, args.held_out_factor)
        except UndeterminedLawError as error:
            raise UserError(f"runs: those of {name} do not determine a law: {error}; add runs") from error
        print(describe_fit(name, fits[name]))
    sources, command = describe_sources(paths), _command(args)
    records |= {name: law_record(fit, sources, command) for name, fit in fits.items()}
    with translate_write_errors("output", args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    write_output(args.output, json.dumps(records, indent=1) + "\n")
    plot = args.plot or args.output.with_suffix(".png")
    plot_fits(fits, plot)
    logger.info("wrote %s and %s", args.output, plot)
    return fits


def _command(args: ScalingArgs) -> str:
    """Return the command line of these options."""
    words = ["python", "scripts/scaling.py"]
    for option in fields(args):
        value = getattr(args, option.name)
        if value not in ([], option.default):
            words += [f"--{option.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
