"""Create `.venv` and install the package in it. `make` runs this; without make, run it directly.

It imports only the standard library and has the syntax of Python 3.7, so that older Pythons print the error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = Path(".venv")
UNFINISHED = ENVIRONMENT / "unfinished"  # exists from the creation of the environment until it is complete
TORCH_BUILD = ENVIRONMENT / "torch"  # the build that was installed: default, cpu, cu126, ...
ROOT = ENVIRONMENT / "root"  # the folder of the project in which the environment was created
CONSTRAINTS = "constraints.txt"


class InstallError(Exception):
    """The installation cannot continue; the message names the fix."""


def main() -> None:
    """Install the package with the extras and the build of torch that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--extra", default="", help="extras of setup.cfg, separated by commas: dev")
    parser.add_argument(
        "--torch",
        default="auto",
        help="default: the build of pip's index; cpu, cu126, ...: that build, as in uv --torch-backend; "
        "auto: cpu on Linux without an NVIDIA driver, otherwise default",
    )
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    try:
        check_python()
        create_environment()
        install_torch(args.torch or "auto")
        install_package(args.extra)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def check_python() -> None:
    """Raise if this Python is too old or cannot create environments."""
    if sys.version_info < (3, 11):  # noqa: UP036
        raise InstallError(
            f"PYTHON ({sys.executable}): must be Python 3.11 or newer; use make story PYTHON=python3.12"
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise InstallError(
            f"PYTHON ({sys.executable}): must have the modules venv and ensurepip; on Debian and Ubuntu, use "
            f"apt install python3.{sys.version_info[1]}-venv"
        )


def create_environment() -> None:
    """Create the environment if it is missing, interrupted or broken, and install pip if it is missing.

    An environment contains absolute paths: in a copy of the project it would run the code of the original.
    """
    reason = ""
    if UNFINISHED.exists():
        reason = "the last installation was interrupted"
    elif ROOT.exists() and ROOT.read_text(encoding="utf-8").rstrip("\n") != os.getcwd():
        reason = f"it was created in {ROOT.read_text(encoding='utf-8').strip()}"
    if reason:
        print(f"creating {ENVIRONMENT} again: {reason}")
        shutil.rmtree(ENVIRONMENT)
    if not succeeds(environment_program("python"), "--version"):
        ENVIRONMENT.mkdir(exist_ok=True)
        UNFINISHED.touch()
        for link in ENVIRONMENT.glob("bin/python*"):
            link.unlink()  # to a Python that was removed; venv keeps existing links
        run(sys.executable, "-m", "venv", str(ENVIRONMENT))
    if not succeeds(environment_program("python"), "-m", "pip", "--version"):
        run(environment_program("python"), "-m", "ensurepip", "--upgrade")


def install_torch(build: str) -> None:
    """Install torch unless it comes with the package, and print which build was chosen.

    `auto` keeps an installed torch.
    """
    is_installed = succeeds(environment_program("python"), "-c", _FIND_TORCH)
    is_chosen = build != "auto"
    if not is_chosen:
        if is_installed:
            return
        build = automatic_build()
    elif is_installed and TORCH_BUILD.exists() and TORCH_BUILD.read_text().strip() == build:
        return
    if build == "default":
        print("torch: the build of pip's index")
        if is_installed:
            pip("install", "--force-reinstall", "-c", CONSTRAINTS, "torch")
    elif is_chosen or is_available(build):
        print(f"torch: the {build} build; TORCH=default selects the build of pip's index")
        pip("install", "--quiet", "-c", CONSTRAINTS, "uv")
        run(*uv_install(build), "--reinstall")
    else:
        print(f"torch: the build of pip's index, because the index of {build} builds cannot be reached")
        build = "default"
    TORCH_BUILD.write_text(build + "\n")


_FIND_TORCH = "from importlib.metadata import version; version('torch')"


def automatic_build() -> str:
    """Return `cpu` on Linux without an NVIDIA driver, otherwise `default`.

    Public indexes have CUDA builds for Linux, and for macOS and Windows the builds that most machines need.
    """
    has_driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    return "default" if has_driver or sys.platform != "linux" else "cpu"


def is_available(build: str) -> bool:
    """Whether uv finds torch in PyTorch's index of that build."""
    python = environment_program("python")
    return succeeds(python, "-m", "pip", "install", "-c", CONSTRAINTS, "uv") and succeeds(
        *uv_install(build), "--dry-run"
    )


def uv_install(build: str) -> list[str]:
    """Return the command that installs a build of torch; pip then installs what torch requires."""
    uv = [environment_program("uv"), "pip", "install", "--python", environment_program("python")]
    return [*uv, "--torch-backend", build, "--no-deps", "-c", CONSTRAINTS, "torch"]


def install_package(extra: str) -> None:
    """Install this checkout and its requirements, and mark the environment as complete."""
    print(f"installing the package and its requirements in {ENVIRONMENT}")
    pip("install", "-c", CONSTRAINTS, "-e", f".[{extra}]" if extra else ".")
    ROOT.write_text(os.getcwd() + "\n", encoding="utf-8")
    if UNFINISHED.exists():
        UNFINISHED.unlink()


def environment_program(name: str) -> str:
    """Return the path of a program of the environment."""
    return str(ENVIRONMENT / "Scripts" / f"{name}.exe" if os.name == "nt" else ENVIRONMENT / "bin" / name)


def pip(*arguments: str) -> None:
    """Run pip in the environment; see `run`."""
    run(environment_program("python"), "-m", "pip", "--disable-pip-version-check", *arguments)


def run(*command: str) -> None:
    """Run a command whose progress is printed.

    Raises:
        InstallError: the command failed.
    """
    sys.stdout.flush()
    code = subprocess.call(command, env=child_variables())
    if code:
        shown = " ".join(command[:4])
        raise InstallError(f"{shown} (exit code {code}): see its output above; run make again to continue")


def succeeds(*command: str) -> bool:
    """Whether a command exists and ends with exit code 0. Its output is discarded."""
    try:
        done = subprocess.run(command, env=child_variables(), capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def child_variables() -> dict[str, str]:
    """Return the environment variables of the started programs."""
    # pip trusts the certificates of the system, uv only with this variable; the variable has had two names.
    # One retry: where PyTorch's index cannot be reached, pip's index serves.
    return dict(os.environ, UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1", UV_HTTP_RETRIES="1")


if __name__ == "__main__":
    main()
