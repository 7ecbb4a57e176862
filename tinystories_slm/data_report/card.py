"""Render the dataset card: README.md, by which `datasets` and the Hub find the splits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from tinystories_slm.hub.markdown import escape_code, escape_markdown

if TYPE_CHECKING:
    from tinystories_slm.data_report.report import DataReport

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGE = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"))
# License as `StorySource.license` states it: identifier on the Hub.
_LICENSES = {"MIT": "mit", "CDLA-Sharing-1.0": "cdla-sharing-1.0"}


def render_card(
    report: DataReport, *, folder: str, repo_id: str | None = None, license: str | None = None
) -> str:
    """Return the text of the card.

    Args:
        report: Measurements of the stories.
        folder: Folder of the parquet files, relative to the card.
        repo_id: Repository on the Hub for the examples; None for this folder.
        license: Identifier of the license on the Hub; None for that of the source, if it is known.
    """
    environment = Environment(
        loader=PackageLoader("tinystories_slm.data_report", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": escape_code, "text": escape_markdown}
    name = repo_id.split("/")[-1] if repo_id else f"Stories of {report.source}"
    body = environment.get_template("card.md.jinja").render(
        name=name,
        report=report,
        target=repo_id or ".",
        is_on_hub=repo_id is not None,
    )
    return f"---\n{_metadata(report, name, folder, license or _hub_license(report.license))}\n---\n\n{body}"


def _metadata(report: DataReport, name: str, folder: str, license: str | None) -> str:
    num_stories = sum(counts["num_stories"] for counts in report.splits.values())
    sizes = (category for limit, category in (*_SIZES, *_LARGE) if num_stories < limit)
    files = [{"split": split, "path": f"{folder}/{split}.parquet"} for split in report.splits]
    data = DatasetCardData(
        pretty_name=name,
        language="en" if report.is_english else None,
        license=license,
        size_categories=next(sizes, "n>1T"),
        task_categories=["text-generation"],
        source_datasets=report.dataset_ids or None,
        tags=["tinystories"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return data.to_yaml().strip()


def _hub_license(stated: str | None) -> str | None:
    match = re.match(r"\[?([\w.-]+)", stated or "")
    return _LICENSES.get(match[1]) if match else None
