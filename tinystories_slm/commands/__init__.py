"""Commands: `tinystories-slm COMMAND`, and the scripts of the same names."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tinystories_slm import register_auto_classes
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config.parse import given_options
from tinystories_slm.resources import resource_path


@dataclass(frozen=True)
class Command:
    """A command: where its function and its options are, and its line in the overview.

    Modules are imported when the command runs, so that the overview and `--help` print without torch.
    """

    function: str
    """`module:function`; called with the parsed options."""
    args: str
    """`module:class` of the options, or `module:function` that chooses the class by the arguments."""
    summary: str
    is_distributed: bool = False
    """Whether a launcher starts it in several processes, of which rank 0 alone reports how it ended."""
    default_config: str | None = None
    """Resource file that is used when the command line has no `--config`."""
    takes_given: bool = False
    """Whether the function also takes the names of the options that the command line sets."""


_CONFIG = "tinystories_slm.config.run_config:RunConfig"
_ARGS = "tinystories_slm.config.command_args"

COMMANDS = {
    "story": Command(
        "tinystories_slm.commands.story:run_story",
        f"{_ARGS}.run:StoryArgs",
        "train, evaluate and generate in one go",
        default_config="configs/quickstart.yaml",
        takes_given=True,
    ),
    "download_data": Command(
        "tinystories_slm.commands.data:run_download",
        f"{_ARGS}.data:DownloadArgs",
        "stories -> data_dir/raw; --list: the named sets",
    ),
    "train_tokenizer": Command(
        "tinystories_slm.commands.data:run_train_tokenizer", _CONFIG, "stories -> data_dir/tokenizer"
    ),
    "prepare_data": Command(
        "tinystories_slm.commands.data:run_prepare",
        f"{_ARGS}.data:PrepareArgs",
        "tokens -> data_dir/train.bin, validation.bin",
    ),
    "data_report": Command(
        "tinystories_slm.commands.data:run_data_report",
        f"{_ARGS}.reports:DataReportArgs",
        "stories -> data_dir/report.html, dataset card",
    ),
    "train": Command(
        "tinystories_slm.commands.train:run_train",
        f"{_ARGS}.run:TrainCommandArgs",
        "train a model, or resume its run",
        is_distributed=True,
        takes_given=True,
    ),
    "sweep": Command(
        "tinystories_slm.sweeps.sweep:sweep",
        "tinystories_slm.config.command_args.sweep:SweepArgs",
        "train many models; table, heat map, power law",
    ),
    "scaling": Command(
        "tinystories_slm.planning.fit_command:fit_laws",
        f"{_ARGS}.scaling:ScalingArgs",
        "fit the law of the planner to a sweep",
    ),
    "evaluate": Command(
        "tinystories_slm.evaluation.evaluate:evaluate",
        f"{_ARGS}.evaluate:EvaluateArgs",
        "loss and bits per byte of models",
    ),
    "generate": Command(
        "tinystories_slm.commands.generate:generate",
        f"{_ARGS}.generate:GenerateArgs",
        "generate stories from prompts",
    ),
    "serve": Command(
        "tinystories_slm.serving.server:serve",
        "tinystories_slm.config.command_args.serve:ServeArgs",
        "OpenAI-compatible server of a model",
    ),
    "export": Command(
        "tinystories_slm.export.exporters:export",
        f"{_ARGS}.publish:ExportArgs",
        "native, gguf, onnx, llama2c or custom form",
    ),
    "push_to_hub": Command(
        "tinystories_slm.hub.steps:push_run", f"{_ARGS}.publish:PushArgs", "publish a run on the Hub"
    ),
    "inspect_data": Command(
        "tinystories_slm.inspection.inspect_data:inspect_data",
        f"{_ARGS}.inspection:InspectDataArgs",
        "the stories of a step, the steps of a story",
    ),
    "surprisal": Command(
        "tinystories_slm.inspection.surprisal:surprisal",
        f"{_ARGS}.inspection:SurprisalArgs",
        "loss, rank and entropy of each token",
    ),
    "exposure": Command(
        "tinystories_slm.inspection.exposure:measure_exposure",
        f"{_ARGS}.inspection:ExposureArgs",
        "how far a run memorized its canaries",
    ),
    "report": Command(
        "tinystories_slm.runs.report:report", f"{_ARGS}.reports:ReportArgs", "write report.html of a run"
    ),
    "report_card": Command(
        "tinystories_slm.report_card.card:report_card",
        f"{_ARGS}.reports:ReportCardArgs",
        "measure generated stories: page and figures",
    ),
    "demo": Command(
        "tinystories_slm.demo.command:demo", f"{_ARGS}.demo:DemoArgs", "web page to try models, or its Space"
    ),
    "doctor": Command(
        "tinystories_slm.doctor:doctor",
        f"{_ARGS}.doctor:doctor_args",
        "examine machine and configuration, or a model",
    ),
}


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Run the command `name` with the options of `argv` (default: the command line)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Python puts a script's folder first on the import path, where scripts/evaluate.py would hide the library
    # `evaluate`. Nothing in that folder is meant to be imported.
    if sys.path and (Path(sys.path[0]) / "push_to_hub.py").is_file():
        del sys.path[0]
    command, given_arguments = COMMANDS[name], list(arguments)
    if command.default_config and not any(arg.partition("=")[0] == "--config" for arg in arguments):
        arguments.insert(0, f"--config={resource_path(command.default_config)}")
    args_type = _load(command.args)
    if not isinstance(args_type, type):
        args_type = args_type(arguments)

    def call(args: Any) -> None:
        register_auto_classes()
        if command.takes_given:
            _load(command.function)(args, given_options(args_type, given_arguments))
        else:
            _load(command.function)(args)

    run_command(
        call,
        args_type,
        arguments,
        is_distributed=command.is_distributed,
    )


def main() -> None:
    """Run `tinystories-slm COMMAND ...`."""
    given = sys.argv[1] if len(sys.argv) > 1 else "--help"
    name = given.replace("-", "_")  # push-to-hub is push_to_hub
    if name in COMMANDS:
        sys.argv[0] = f"tinystories-slm {sys.argv.pop(1)}"
        run(name)
        return
    lines = [f"  {command:<16} {described.summary}" for command, described in COMMANDS.items()]
    overview = "\n".join(["usage: tinystories-slm COMMAND [--help] [options]", "", *lines])
    if given in ("-h", "--help"):
        print(overview)
        return
    print(f"error: unknown command {given!r}\n{overview}", file=sys.stderr)
    sys.exit(2)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
