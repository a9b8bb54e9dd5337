"""The page of what an audit found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cmaclip_fast.errors import clipped
from cmaclip_fast.pages.explanation import picture_uri
from cmaclip_fast.pages.page import NAME_LENGTH, render_template, write_html
from cmaclip_fast.pages.views import AuditRow, RowView

_KINDS = {
    "label": "the label looks wrong to a model that was not shown it",
    "duplicate": "the label differs from that of a near-duplicate",
    "mismatch": "the text does not fit the picture",
    "next": "a label would teach the model most",
}

_SIDE, _TEXT_LENGTH = 128, 300


def render_audit(findings: list[AuditRow], path: str | os.PathLike[str], title: str, summary: dict[str, str]) -> None:
    """Writes the findings as one self-contained HTML file, atomically.

    Raises:
        InputError: `path` cannot be written.
    """
    tasks = list(dict.fromkeys(finding.task for finding in findings if finding.task is not None))
    numbers = {task: number for number, task in enumerate(tasks)}
    html = render_template(
        "audit.html",
        ("_sort.js", "_audit.js"),
        title=title,
        summary=summary,
        kinds=_KINDS,
        there=list(dict.fromkeys(finding.kind for finding in findings)),
        tasks=[clipped(task, NAME_LENGTH) for task in tasks],
        rows=[_finding(finding, numbers) for finding in findings],
    )
    write_html(html, Path(path))


def _finding(finding: AuditRow, numbers: dict[str, int]) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "task": clipped(finding.task or "", NAME_LENGTH),
        "task_number": "" if finding.task is None else numbers[finding.task],
        "rank": finding.rank,
        "score": finding.score,
        "row": _row(finding.row),
        "related": None if finding.related is None else _row(finding.related),
        "given": clipped(finding.given or "", NAME_LENGTH),
        "suggested": clipped(finding.suggested or "", NAME_LENGTH),
        "likely": finding.likely,
        "note": clipped(finding.note, 2 * NAME_LENGTH),
    }


def _row(row: RowView) -> dict[str, Any]:
    return {
        "row": row.row,
        "key": clipped(" ".join(row.keys), NAME_LENGTH),
        # several keys with tabs, as a spreadsheet takes them
        "copied": "\t".join(row.keys) or str(row.row),
        "text": None if row.text is None else clipped(row.text, _TEXT_LENGTH),
        "picture": None if row.image is None else picture_uri(row.image, _SIDE),
    }
