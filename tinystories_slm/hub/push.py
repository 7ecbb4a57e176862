"""Push a run to the Hub as one commit with the model, its card and its records."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from tinystories_slm.config.command_args.publish import PushArgs
from tinystories_slm.errors import UserError
from tinystories_slm.hub.staging import CODE_FILES, FILES, stage, stage_code

RepoType = Literal["model", "dataset"]

_MESSAGE = "Model, card and records of the run"
_CODE_MESSAGE = "Model code"


def push(args: PushArgs) -> str | None:
    """Publish `args.run` and print the files and the commit; unchanged files make no commit.

    Returns:
        The commit that holds these files, and the files that people added; None after a dry run.

    Raises:
        UserError: the run cannot be published, or the Hub rejects the push or cannot be reached. The
            repository then keeps its content.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.code_only:
            files = stage_code(folder)
        else:
            files = stage(args.run, folder, repo_id=args.repo_id, formats=args.formats, license=args.license)
        if args.dry_run:
            print(format_listing(folder, files))
            print(f"{len(files)} files would be one commit in {args.repo_id}; nothing was uploaded")
            return None
        check_token()
        with translate_hub_errors("repo_id", args.repo_id):
            return _publish(args, folder, files)


def check_token() -> None:
    """Raise UserError if this user is not logged in to the Hub."""
    if get_token() is None:
        raise UserError("no access token was found; run `hf auth login`, or set HF_TOKEN")


def _publish(args: PushArgs, folder: Path, files: list[Path]) -> str:
    """Commit the files that changed, set the tag, and return the commit."""
    api = HfApi(library_name="tinystories_slm")
    if args.code_only:
        head, message = _head_with_code(api, args.repo_id), _CODE_MESSAGE
    else:
        head = head_commit(api, args.repo_id, "repo_id", private=args.private)
        message = f"{_MESSAGE} {args.run.resolve().name}"
    remote = remote_files(api, args.repo_id, head)
    changed = changed_files(remote, folder, files)
    stale = [] if args.code_only else _stale_files(api, args.repo_id, head, remote, files)
    tagged = _tagged_commit(api, args, None if changed or stale else head)
    if changed or stale:
        commit = commit_files(api, args.repo_id, head, message, folder, files, stale)
        if changed:
            print(format_listing(folder, changed))
        print(f"new or changed: {len(changed)} of {len(files)} files")
        if stale:
            print(f"removed, as this push no longer makes them: {', '.join(stale)}")
    else:
        commit = head
        print(f"nothing has changed: {args.repo_id} already holds these {len(files)} files")
    if args.revision and not tagged:
        api.create_tag(args.repo_id, tag=args.revision, revision=commit)
    print(
        f"{api.endpoint}/{args.repo_id} at commit {commit}"
        + (f", tag {args.revision}" if args.revision else "")
    )
    return commit


def commit_files(
    api: HfApi,
    repo_id: str,
    head: str,
    message: str,
    folder: Path,
    files: list[Path],
    stale: Sequence[str] = (),
    repo_type: RepoType = "model",
    branch: str = "main",
) -> str:
    """Commit `files` on top of `head`, without the files `stale`, to `branch`, and return the new commit.

    Raises:
        UserError: the .gitignore of the repository excludes a file.
    """
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path.as_posix(), folder / path) for path in files),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ],
        commit_message=message,
        parent_commit=head,  # the Hub rejects the commit if the branch has moved since
        repo_type=repo_type,
        revision=branch,
    ).oid
    if left_out := changed_files(remote_files(api, repo_id, commit, repo_type), folder, files):
        raise UserError(
            f"{repo_id} left out {', '.join(map(str, left_out))} (its .gitignore?) at {commit}; "
            "remove the pattern there and push again"
        )
    return commit


def _head_with_code(api: HfApi, repo_id: str) -> str:
    """Return the newest commit of a repository that holds this project's code.

    Raises:
        UserError: the repository does not hold this project's code.
    """
    info = api.model_info(repo_id)
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if missing := [name for name in CODE_FILES if name not in files]:
        raise UserError(
            f"code_only: {repo_id} has no {missing[0]}, so it holds no model with this project's code; push "
            "a run with --format custom"
        )
    return info.sha


def head_commit(
    api: HfApi, repo_id: str, option: str, *, private: bool, repo_type: RepoType = "model"
) -> str:
    """Return the newest commit of the main branch; create the repository if it does not exist.

    Raises:
        UserError: `private` is set and the repository is public, or it has no commit; `option` names it.
    """
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):  # it exists, but this user has no access
            raise
        # private=None: the default of the owner
        api.create_repo(repo_id, private=private or None, repo_type=repo_type)
        info = api.repo_info(repo_id, repo_type=repo_type)
    if private and not info.private:
        raise UserError(
            f"private: {repo_id} already exists and is public; make it private in its settings first, "
            f"or use another --{option}"
        )
    if info.sha is None:
        raise UserError(f"{option} ({repo_id}) has no commit; delete it on the Hub and push again")
    return info.sha


def remote_files(api: HfApi, repo_id: str, commit: str, repo_type: RepoType = "model") -> dict[str, str]:
    """Return the hash of each file of `commit`, by which the Hub identifies its content."""
    return {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
        if isinstance(entry, RepoFile)
    }


def _stale_files(
    api: HfApi, repo_id: str, head: str, remote: Mapping[str, str], files: list[Path]
) -> list[str]:
    """Return the files of an earlier push that this one does not make, such as native/ of another run.

    A file belongs to a push if a push made its newest version: people may add a chat_template.jinja.
    """
    made = {path.as_posix() for path in files}
    candidates = [name for name in FILES if name in remote and name not in made]
    if not candidates:
        return []
    entries = api.get_paths_info(repo_id, candidates, expand=True, revision=head)
    return [
        entry.path
        for entry in entries
        if isinstance(entry, RepoFile)
        and entry.last_commit is not None
        and entry.last_commit.title.startswith((_MESSAGE, _CODE_MESSAGE))
    ]


def changed_files(remote: Mapping[str, str], folder: Path, files: list[Path]) -> list[Path]:
    """Return the files that are not in `remote`, or there with other content."""
    return [path for path in files if remote.get(path.as_posix()) not in _hashes(folder / path)]


def _hashes(path: Path) -> tuple[str, str]:
    """Return the two hashes by which the Hub identifies a file: git's blob id and, for LFS, SHA-256."""
    git, sha256 = hashlib.sha1(b"blob %d\0" % path.stat().st_size), hashlib.sha256()
    with path.open("rb") as file:  # in parts: stories may be larger than the memory
        while part := file.read(2**20):
            git.update(part)
            sha256.update(part)
    return git.hexdigest(), sha256.hexdigest()


def _tagged_commit(api: HfApi, args: PushArgs, expected: str | None) -> str | None:
    """Return the commit of the tag `args.revision`, which must be `expected`; None without such a tag.

    Raises:
        UserError: the tag is on another commit, or a branch has that name. Nothing was uploaded.
    """
    if args.revision is None:
        return None
    refs = api.list_repo_refs(args.repo_id)
    if any(branch.name == args.revision for branch in refs.branches):
        raise UserError(f"revision ({args.revision}) is a branch of {args.repo_id}; use another tag")
    commit = next((tag.target_commit for tag in refs.tags if tag.name == args.revision), None)
    if commit is not None and commit != expected:
        raise UserError(
            f"revision ({args.revision}) is a tag of {args.repo_id} on commit {commit[:12]} with other "
            "files, and tags are not moved; use another tag, or delete this one first with "
            f"`hf repos tag delete {args.repo_id} {args.revision} --yes`"
        )
    return commit


def format_listing(folder: Path, files: list[Path]) -> str:
    """Return a line for each file: its size in bytes and its path."""
    return "\n".join(f"{(folder / path).stat().st_size:>12,}  {path.as_posix()}" for path in files)


@contextmanager
def translate_hub_errors(option: str, repo_id: str) -> Iterator[None]:
    """Raise errors of the Hub, the HTTP library or the network as a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} ({repo_id}): {_explain(error, option)}") from error


def _explain(error: Exception, option: str) -> str:
    """Return the cause of an error of the Hub or the network, and the fix."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    response = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if response is not None:
        message = response.server_message or _single_line(response)
        return {
            401: "the Hub rejects the access token (401); run `hf auth login` or correct HF_TOKEN",
            402: f"the Hub requires payment (402: {message})",
            403: f"the access token has no write access there (403: {message}); use one that has",
            404: f"the user, organization or repository does not exist (404: {message}); correct --{option}",
            412: "the branch received another commit in the meantime (412); push again",
        }.get(
            response.response.status_code,
            f"the Hub rejected the push ({response.response.status_code}: {message}); nothing was published",
        )
    if isinstance(error, ValueError):
        return f"{_single_line(error)}; nothing was published"
    last = causes[-1]
    return (
        f"the connection to the Hub failed ({type(last).__name__}: {_single_line(last)}), and no commit was "
        "confirmed; push again, which uploads only missing files"
    )


def _single_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(". ")[:300]
