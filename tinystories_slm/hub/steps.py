"""Push the kept steps of a run: the model of optimizer step 512 is the branch `step512`."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from tinystories_slm.config.command_args.publish import PushArgs
from tinystories_slm.errors import UserError
from tinystories_slm.hub.push import (
    changed_files,
    commit_files,
    format_listing,
    push,
    remote_files,
    translate_hub_errors,
)
from tinystories_slm.hub.staging import FILES, stage_step
from tinystories_slm.runs.run_dir import RunDir


def push_run(args: PushArgs) -> str | None:
    """Call `push`, then push a branch for each kept step with `args.all_steps`.

    A branch that holds these files is left as it is, so that an interrupted push continues where it ended.

    Raises:
        UserError: as `push`; or the run kept no steps. Finished branches stay.
    """
    steps = list(RunDir(args.run).kept_steps()) if args.all_steps and args.run is not None else []
    if args.all_steps and not steps:
        raise UserError(f"all_steps: {args.run} has no models in steps/; train with --train.keep log")
    head = push(args)
    for step in steps:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = stage_step(args.run, step, folder, repo_id=args.repo_id, formats=args.formats)
            if head is None:
                size = sum((folder / path).stat().st_size for path in files)
                print(f"branch {branch_of(step)}: {len(files)} files, {size:,} bytes; nothing was uploaded")
                continue
            with translate_hub_errors("repo_id", args.repo_id):
                _push_step(args.repo_id, step, head, folder, files)
    return head


def branch_of(step: int) -> str:
    """Return the branch of an optimizer step, named as Pythia names them."""
    return f"step{step}"


def _push_step(repo_id: str, step: int, main: str, folder: Path, files: list[Path]) -> None:
    """Commit the files of a step to its branch, which starts at the commit `main` if it is new."""
    api, branch = HfApi(library_name="tinystories_slm"), branch_of(step)
    refs = api.list_repo_refs(repo_id)
    if any(tag.name == branch for tag in refs.tags):
        raise UserError(f"all_steps: {branch} is a tag of {repo_id}; delete it, as a step needs this name")
    head = next((found.target_commit for found in refs.branches if found.name == branch), None)
    if head is None:
        # From main: the files that a step shares with it are not uploaded.
        api.create_branch(repo_id, branch=branch, revision=main)
        head = main
    remote = remote_files(api, repo_id, head)
    changed = changed_files(remote, folder, files)
    made = {path.as_posix() for path in files}
    stale = [name for name in FILES if name in remote and name not in made]
    if changed or stale:
        message = f"Model of optimizer step {step}"
        commit_files(api, repo_id, head, message, folder, changed, stale, branch=branch)
        print(format_listing(folder, changed))
    print(f"branch {branch}: {len(changed)} of {len(files)} files new or changed")
