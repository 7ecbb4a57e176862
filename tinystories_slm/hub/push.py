"""A run to the Hub: one commit with the model, its card and its record, or none if nothing has changed."""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from tinystories_slm.errors import InputError
from tinystories_slm.hub.staging import CODE_FILES, stage, stage_code

FORMATS = ("custom", "native")


@dataclass(frozen=True, kw_only=True)
class PushArgs:
    """Publish a run on the Hugging Face Hub as one commit, with the token of `hf auth login` or HF_TOKEN."""

    run: Path | None = None
    """Run folder; its best/ is the model. Required, except with `code_only`."""
    repo_id: str
    """USER/NAME of the repository, which is made if there is none."""
    private: bool = False
    """Make the repository visible to you alone; one that is public already is refused."""
    format: str = "custom,native"
    """`custom`: with this project's code; `native`: as a class of transformers; with both, native is in
    the folder native/."""
    revision: str | None = None
    """Tag to put on the commit (`v1`); a tag that is there already is never moved."""
    license: str | None = None
    """Of the model, as the Hub spells it (`mit`); null states none."""
    code_only: bool = False
    """Renew the model's code files in a repository that a push made, in one commit, and nothing else:
    weights, card and record stay. For models whose code is older than the transformers of their readers."""
    dry_run: bool = False
    """List every file with its size and stop; nothing is asked of the Hub."""

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise InputError(f"repo_id ({self.repo_id}) cannot be one: {_line(error)}") from error
        if "/" not in self.repo_id:
            raise InputError(f"repo_id ({self.repo_id}) names no owner; write USER/{self.repo_id}")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise InputError(f"format ({self.format}) must be custom, native or custom,native")
        if self.run is None and not self.code_only:
            raise InputError("run is missing; write --run RUN, a run folder")
        if self.code_only:
            for name in ("run", "private", "format", "license"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise InputError(
                        f"{name} ({getattr(self, name)}) has no effect with code_only; leave one of them out"
                    )
        if self.revision is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.revision):
            raise InputError(f"revision ({self.revision}) cannot be a tag; try v1")

    @property
    def formats(self) -> list[str]:
        return [name.strip() for name in self.format.split(",") if name.strip()]


def push(args: PushArgs) -> str | None:
    """Publish `args.run` and print what was done.

    Returns:
        The commit that now holds exactly these files; null after a dry run.

    Raises:
        InputError: the run cannot be published as it is, or the Hub refuses or cannot be reached. What
            was published before is then untouched.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.code_only:
            files = stage_code(folder)
        else:
            files = stage(args.run, folder, repo_id=args.repo_id, formats=args.formats, license=args.license)
        if args.dry_run:
            print(_listing(folder, files))
            print(f"{len(files)} files would be one commit in {args.repo_id}; nothing was sent")
            return None
        if get_token() is None:
            raise InputError("there is no access token; run `hf auth login`, or set HF_TOKEN")
        with _as_input_errors(args.repo_id):
            return _publish(args, folder, files)


def _publish(args: PushArgs, folder: Path, files: list[Path]) -> str:
    api = HfApi(library_name="tinystories_slm")
    if args.code_only:
        head, message = _head_with_code(api, args.repo_id), "Model code"
    else:
        head = _head(api, args)
        message = f"Model, card and record of the run {args.run.resolve().name}"
    changed = _changed(api, args.repo_id, head, folder, files)
    tagged = _tagged_commit(api, args, head if not changed else None)
    commit = head
    if changed:
        commit = api.create_commit(
            args.repo_id,
            [CommitOperationAdd(path.as_posix(), folder / path) for path in files],
            commit_message=message,
            parent_commit=head,  # refused if somebody else committed since we compared
        ).oid
        if left_out := _changed(api, args.repo_id, commit, folder, files):
            raise InputError(
                f"{args.repo_id} left out {', '.join(map(str, left_out))} (its .gitignore?) at {commit}; "
                "let it in there and push again"
            )
        print(_listing(folder, changed))
        print(f"new or changed: {len(changed)} of {len(files)} files")
    else:
        print(f"nothing has changed: {args.repo_id} holds these {len(files)} files already")
    if args.revision and not tagged:
        api.create_tag(args.repo_id, tag=args.revision, revision=commit)
    print(
        f"{api.endpoint}/{args.repo_id} at commit {commit}"
        + (f", tag {args.revision}" if args.revision else "")
    )
    return commit


def _head_with_code(api: HfApi, repo_id: str) -> str:
    """Return the newest commit of a repository that holds this project's code.

    Raises:
        InputError: the repository has no code of ours to renew.
    """
    info = api.model_info(repo_id)
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if missing := [name for name in CODE_FILES if name not in files]:
        raise InputError(
            f"code_only: {repo_id} has no {missing[0]}, so it holds no model with this project's code; push "
            "a run with --format custom"
        )
    return info.sha


def _head(api: HfApi, args: PushArgs) -> str:
    """The newest commit of the repository's main branch; the repository is made if there is none."""
    try:
        info = api.model_info(args.repo_id)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):  # there, and not ours
            raise
        api.create_repo(args.repo_id, private=args.private or None)  # null: as its owner has it
        info = api.model_info(args.repo_id)
    if args.private and not info.private:
        raise InputError(
            f"private: {args.repo_id} is there already and public; make it private in its settings first, "
            "or choose another --repo_id"
        )
    if info.sha is None:
        raise InputError(f"repo_id ({args.repo_id}) has no commit; delete it on the Hub and push again")
    return info.sha


def _changed(api: HfApi, repo_id: str, commit: str, folder: Path, files: list[Path]) -> list[Path]:
    """Those of `files` that the repository at `commit` lacks or has with other content."""
    there = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)
        if isinstance(entry, RepoFile)
    }
    return [path for path in files if there.get(path.as_posix()) not in _hashes(folder / path)]


def _hashes(path: Path) -> tuple[str, str]:
    """What the Hub knows a file by: git's hash or, of large files, SHA-256."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()


def _tagged_commit(api: HfApi, args: PushArgs, expected: str | None) -> str | None:
    """The commit that the tag is on already, which has to be `expected`; null if there is no such tag.

    Raises:
        InputError: the tag is on another commit, or the name is that of a branch. Nothing was uploaded.
    """
    if args.revision is None:
        return None
    refs = api.list_repo_refs(args.repo_id)
    if any(branch.name == args.revision for branch in refs.branches):
        raise InputError(f"revision ({args.revision}) is a branch of {args.repo_id}; choose another tag")
    commit = next((tag.target_commit for tag in refs.tags if tag.name == args.revision), None)
    if commit is not None and commit != expected:
        raise InputError(
            f"revision ({args.revision}) is a tag of {args.repo_id} on commit {commit[:12]} with other "
            "files, and is not moved; choose another, or first "
            f"`hf repos tag delete {args.repo_id} {args.revision} --yes`"
        )
    return commit


def _listing(folder: Path, files: list[Path]) -> str:
    return "\n".join(f"{(folder / path).stat().st_size:>12,}  {path.as_posix()}" for path in files)


@contextmanager
def _as_input_errors(repo_id: str) -> Iterator[None]:
    """Whatever the Hub, the HTTP library of the day or the network raise, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"repo_id ({repo_id}): {_reason(error)}") from error


def _reason(error: Exception) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is not None:
        told = answer.server_message or _line(answer)
        return {
            401: "the Hub does not accept the access token (401); run `hf auth login` or correct HF_TOKEN",
            402: f"the Hub asks for payment (402: {told})",
            403: f"the access token may not write there (403: {told}); use one with write access",
            404: f"there is no such user, organization or repository (404: {told}); correct --repo_id",
            412: "somebody else committed at the same moment (412); push again",
        }.get(
            answer.response.status_code,
            f"the Hub refused ({answer.response.status_code}: {told}); nothing was published",
        )
    if isinstance(error, ValueError):
        return f"{_line(error)}; nothing was published"
    last = causes[-1]
    return (
        f"the connection to the Hub failed ({type(last).__name__}: {_line(last)}); no commit was seen to be "
        "made; push again, which uploads only what is missing"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(". ")[:300]
