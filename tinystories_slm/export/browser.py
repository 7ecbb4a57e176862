"""The page that tells stories in a browser, put beside the graphs that it runs: a static site."""

import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tinystories_slm.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "browser"
FILES = ("index.html", "storyteller.js")
_CDN = "https://cdn.jsdelivr.net/npm/"
_LIBRARY = re.compile(re.escape(_CDN) + r"((?:@[\w-]+/)?[\w-]+)@([\w.-]+)/([\w./-]+)")
"""What index.html loads: package, version, file. It is the one place that names them."""


def write_page(folder: Path, *, vendor: bool = False) -> None:
    """Copy the page into `folder`; with `vendor`, also its libraries, so that it needs no other server.

    Raises:
        InputError: the page or npm is missing, or npm fails.
    """
    for name in FILES:
        if not (PAGE / name).is_file():
            raise InputError(f"{PAGE / name} is missing; export from a clone of the repository")
        shutil.copyfile(PAGE / name, folder / name)
    if vendor:
        with tempfile.TemporaryDirectory() as tarballs:
            vendor_libraries(folder / "index.html", Path(tarballs))


def vendor_libraries(page: Path, tarballs: Path) -> None:
    """Put the libraries that `page` loads into vendor/ beside it, and have it load them from there.

    `tarballs` keeps npm's packages: what is there already is not fetched again.

    Raises:
        InputError: npm is missing, or fails.
    """
    text = page.read_text(encoding="utf-8")
    for package, version, file in sorted(set(_LIBRARY.findall(text))):
        target = page.parent / "vendor" / f"{package}@{version}" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(_tarball(package, version, tarballs)) as tar:
            member = tar.extractfile(f"package/{file}")
            target.write_bytes(member.read())
    page.write_text(text.replace(_CDN, "./vendor/"), encoding="utf-8")


def _tarball(package: str, version: str, tarballs: Path) -> Path:
    # npm's own name for it: @huggingface/tokenizers 0.2.0 is huggingface-tokenizers-0.2.0.tgz
    path = tarballs / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if path.is_file():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise InputError("vendor (True) needs npm, and there is none; install Node.js, or leave --vendor out")
    command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", str(tarballs)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = " ".join(result.stderr.split())[:300]
        raise InputError(f"vendor (True) failed, as npm could not fetch {package}@{version}: {reason}")
    return path
