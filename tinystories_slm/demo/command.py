"""The `demo` command: load the models and serve the page, or write its Space."""

import logging
import threading
from importlib.util import find_spec
from pathlib import Path

import torch

from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.demo.live_stories import StoryModel
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.host import num_usable_cores
from tinystories_slm.io.file_errors import expand_user
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.report_card.display_names import display_names

logger = logging.getLogger(__name__)

_REPORT_CARD = "report_card.html"


def demo(args: DemoArgs) -> None:
    """Serve the page until it is interrupted; with `args.export_space`, write the Space instead.

    Raises:
        UserError: gradio is missing, a model cannot be loaded, or the port is in use.
    """
    if args.export_space is not None:
        from tinystories_slm.demo.space import export_space

        export_space(args, args.export_space)
        return
    if find_spec("gradio") is None:
        raise UserError("gradio is not installed; pip install 'tinystories_slm[demo]'")
    print(serve(args), flush=True)
    _wait_for_signal()


def _wait_for_signal() -> None:
    """Block until Ctrl-C or SIGTERM ends the process."""
    threading.Event().wait()


def serve(args: DemoArgs) -> str:
    """Load the models, start the server in threads of this process, and return the address of the page.

    Raises:
        UserError: a model cannot be loaded, or the port is in use.
    """
    from tinystories_slm.demo.page import build_page, launch_page

    models = load_models(args)
    if models[0].model.device.type == "cpu":
        # Threads of several stories on one core would wait for each other.
        torch.set_num_threads(max(1, num_usable_cores() // args.concurrency))
    logger.info("models %s on %s", ", ".join(one.name for one in models), models[0].model.device)
    return launch_page(build_page(models, args, find_report_cards(args)), args)


def load_models(args: DemoArgs) -> list[StoryModel]:
    """Return the models of `args`.

    Raises:
        UserError: one cannot be loaded, or is given twice.
    """
    return [
        StoryModel(
            name,
            *load_model_folder(
                model,
                revision=args.revision,
                trust_remote_code=args.trust_remote_code,
                device=args.device,
            ),
        )
        for name, model in zip(display_names(args.models, option="model"), args.models, strict=True)
    ]


def find_report_cards(args: DemoArgs) -> list[Path]:
    """Return the report card of the options, else that of each model folder or of its run."""
    if args.report_card is not None:
        return [args.report_card]
    folders = [expand_user(model) for model in args.models]
    candidates = [
        [folder / _REPORT_CARD, folder.resolve().parent / _REPORT_CARD]
        for folder in folders
        if folder.is_dir()
    ]
    found = [next(filter(Path.is_file, paths), None) for paths in candidates]
    return [path for path in dict.fromkeys(found) if path is not None]
