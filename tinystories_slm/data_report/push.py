"""Push prepared stories, their card and their report to the Hub as a dataset."""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from tinystories_slm.config.command_args.reports import DataReportArgs
from tinystories_slm.data_report.card import render_card
from tinystories_slm.data_report.report import DataReport
from tinystories_slm.hub.push import (
    changed_files,
    check_token,
    commit_files,
    format_listing,
    head_commit,
    remote_files,
    translate_hub_errors,
)
from tinystories_slm.hub.staging import check_no_secrets

_FOLDER = "data"
_TEXTS = ("README.md", "report.html", "report.json")


def push_stories(args: DataReportArgs, report: DataReport) -> str:
    """Publish the stories of `args.data.data_dir` as `args.push`; unchanged files make no commit.

    Returns:
        The commit that holds these files, and the files that people added.

    Raises:
        UserError: a file holds a path of this machine or a token, or the Hub rejects the push or cannot be
            reached. The dataset then keeps its content.
    """
    repo_id = str(args.push)
    check_token()
    # A copy on the same disk: the stories may be larger than the folder for temporary files.
    with tempfile.TemporaryDirectory(dir=args.data.data_dir, prefix=".push_") as name:
        folder = Path(name)
        files = _stage(args, report, folder)
        with translate_hub_errors("push", repo_id):
            api = HfApi(library_name="tinystories_slm")
            commit = head_commit(api, repo_id, "push", private=args.private, repo_type="dataset")
            changed = changed_files(remote_files(api, repo_id, commit, "dataset"), folder, files)
            if changed:
                message = f"Stories of {report.source}, card and report"
                commit = commit_files(api, repo_id, commit, message, folder, files, repo_type="dataset")
                print(format_listing(folder, changed))
    print(
        f"new or changed: {len(changed)} of {len(files)} files"
        if changed
        else f"nothing has changed: {repo_id} already holds these {len(files)} files"
    )
    print(f"{api.endpoint}/datasets/{repo_id} at commit {commit}; to read it: --data.source {repo_id}")
    return commit


def _stage(args: DataReportArgs, report: DataReport, folder: Path) -> list[Path]:
    """Fill the empty `folder` with the files of the dataset, and return their paths relative to it."""
    source = args.data.data_dir
    (folder / _FOLDER).mkdir()
    parquet = [Path(_FOLDER) / f"{split}.parquet" for split in report.splits]
    for path in parquet:
        shutil.copyfile(source / "raw" / path.name, folder / path)
    for name in ("report.html", "report.json"):
        shutil.copyfile(source / name, folder / name)
    card = render_card(report, folder=_FOLDER, repo_id=args.push, license=args.license)
    (folder / "README.md").write_text(card, encoding="utf-8")
    texts = [Path(name) for name in _TEXTS]
    check_no_secrets(folder, texts, source, owner="the data")
    return [*texts, *parquet]
