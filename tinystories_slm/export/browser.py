"""The static page that generates stories in a browser from the exported ONNX graphs."""

import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tinystories_slm.errors import UserError

PAGE_DIR = Path(__file__).with_name("web")
PAGE_FILES = ("index.html", "generate.js")
_CDN = "https://cdn.jsdelivr.net/npm/"
_LIBRARY = re.compile(re.escape(_CDN) + r"((?:@[\w-]+/)?[\w-]+)@([\w.-]+)/([\w./-]+)")
"""Matches package, version and file of each library in index.html, the only place that names them."""


def write_page(folder: Path, *, vendor: bool = False) -> None:
    """Copy the page to `folder`; with `vendor`, also its libraries, so that it needs no other server.

    Raises:
        UserError: a file of the page is missing, or npm is missing or fails.
    """
    for name in PAGE_FILES:
        if not (PAGE_DIR / name).is_file():
            raise UserError(f"{PAGE_DIR / name} is missing; reinstall tinystories_slm")
        shutil.copyfile(PAGE_DIR / name, folder / name)
    if vendor:
        with tempfile.TemporaryDirectory() as tarballs:
            vendor_libraries(folder / "index.html", Path(tarballs))


def vendor_libraries(page: Path, tarballs: Path) -> None:
    """Copy the libraries that `page` loads into the folder vendor/ next to it, and rewrite their addresses.

    `tarballs` is a cache of npm packages; packages in it are not downloaded again.

    Raises:
        UserError: npm is missing or fails.
    """
    text = page.read_text(encoding="utf-8")
    for package, version, file in sorted(set(_LIBRARY.findall(text))):
        target = page.parent / "vendor" / f"{package}@{version}" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(_download_tarball(package, version, tarballs)) as tar:
            member = tar.extractfile(f"package/{file}")
            target.write_bytes(member.read())
    page.write_text(text.replace(_CDN, "./vendor/"), encoding="utf-8")


def _download_tarball(package: str, version: str, tarballs: Path) -> Path:
    # File name chosen by npm: huggingface-tokenizers-0.2.0.tgz for @huggingface/tokenizers 0.2.0.
    path = tarballs / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if path.is_file():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("vendor (True) needs npm, which is not installed; install Node.js, or omit --vendor")
    command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", str(tarballs)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = " ".join(result.stderr.split())[:300]
        raise UserError(
            f"vendor (True): npm could not download {package}@{version} ({reason}); omit --vendor"
        )
    return path
