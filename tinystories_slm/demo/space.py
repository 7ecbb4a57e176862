"""The page as a Space of the Hub.

The folder has a copy of this package, because a Space installs only what a package index has. The models'
own code (`trust_remote_code`) would not be enough: sampling, streaming and the page are not in it.
"""

import shutil
from importlib.metadata import requires, version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import atomic_directory

_PACKAGE = Path(__file__).parents[1]
_APP = '''"""The page of this Space; README.md describes it."""

from tinystories_slm.config.command_args.demo import DemoArgs
from tinystories_slm.demo.command import demo

if __name__ == "__main__":
    demo({args})
'''
_README = """---
{header}---

# {title}

A page on which {models} {write} stories, with the probability of every word. `tinystories_slm/` is a copy of
the package that serves the page. Votes of the blind comparison are lost when the Space restarts.
"""


def export_space(args: DemoArgs, folder: Path) -> None:
    """Write the files of a Space to `folder` and print their paths.

    Raises:
        UserError: a model is not a Hub id, or the folder is not empty.
    """
    for model in args.models:
        if Path(model).exists() or model.startswith((".", "/", "~")):
            raise UserError(
                f"model ({model}): must be a Hub id for export_space; publish it with push_to_hub.py first"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export_space ({folder}): must be a new or empty folder; use another one")
    with atomic_directory(folder, replace=True) as partial:
        shutil.copytree(_PACKAGE, partial / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        (partial / "app.py").write_text(_APP.format(args=_app_args(args)), encoding="utf-8")
        (partial / "requirements.txt").write_text(_requirements(), encoding="utf-8")
        (partial / "README.md").write_text(_readme(args), encoding="utf-8")
    for name in ("README.md", "app.py", "requirements.txt", _PACKAGE.name):
        print(folder / name)


def _app_args(args: DemoArgs) -> str:
    """Return the options of the Space, as Python code: on all addresses, and otherwise as given."""
    options = {"model": args.models, "host": "0.0.0.0"}
    for name in ("max_new_tokens", "concurrency", "queue_size", "revision", "trust_remote_code"):
        if getattr(args, name) != DemoArgs.__dataclass_fields__[name].default:
            options[name] = getattr(args, name)
    return f"DemoArgs({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def _requirements() -> str:
    """Return the requirements of the package and gradio, at the installed versions."""
    needed = [Requirement(line) for line in requires(_PACKAGE.name)]
    needed = [one for one in needed if one.marker is None] + [Requirement("gradio")]
    for one in needed:
        # Without a local part such as +cpu, which the package index does not have.
        one.specifier = SpecifierSet(f"=={version(one.name).partition('+')[0]}")
    return "".join(sorted(f"{one}\n" for one in needed))


def _readme(args: DemoArgs) -> str:
    title = f"Stories by {args.models[0].rpartition('/')[2]}"
    header = {
        "title": title,
        "emoji": "📖",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "app_file": "app.py",
        "models": args.models,
        "short_description": "A small model writes stories, word by word"[:60],
        "suggested_hardware": "cpu-basic",
    }
    return _README.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        title=title,
        models=" and ".join(f"[{one}](https://huggingface.co/{one})" for one in args.models),
        write="writes" if len(args.models) == 1 else "write",
    )
