"""What an audit finds: as a table, as a file, and as a page shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError
from cmaclip_fast.files import replacing
from cmaclip_fast.pages.views import AuditRow, RowView

KINDS = ("label", "duplicate", "mismatch", "next")
"""What is looked for: labels that look wrong, near-duplicates with different labels, texts that do not fit their
pictures, rows most worth labelling next."""

THUMBNAIL = 128
"""The longest side of the pictures of a page."""

_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("task", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("row", pa.int64()),
        pa.field("given", pa.string()),
        pa.field("suggested", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("likely", pa.bool_()),
        pa.field("related_row", pa.int64()),
        pa.field("note", pa.string()),
    ]
)


@dataclass(frozen=True)
class Finding:
    """Something about a row that is worth a look.

    Attributes:
        kind: one of `KINDS`.
        task: the task that it is about; None for a mismatch found by the towers' own similarity.
        row: of the table, counted from 0.
        score: 0 to 1, higher is more worth a look; comparable within a kind and task alone. Of `label` 1 minus the
            probability of the given label; of `duplicate` how often the labels of rows that are alike in this way
            agree, 1 for rows alike in text and picture; of `mismatch` how badly text and picture fit; of `next` 1
            minus the margin between the two best classes.
        given, suggested: the label, and the one that the finding speaks for.
        likely: whether the label is more likely wrong than right: of `label` cleanlab's verdict; None for other kinds.
        related: of `duplicate`, the other row, counted from 0.
        note: the reason, in a few words.
    """

    kind: str
    task: str | None
    row: int
    score: float
    given: str | None = None
    suggested: str | None = None
    likely: bool | None = None
    related: int | None = None
    note: str = ""


def check_keys(table: Table) -> None:
    """
    Raises:
        InputError: a key column has the name of another column of the file.
    """
    keys = list(dict.fromkeys(table.columns.keys))
    related = [f"related_{name}" for name in keys]
    taken = [name for name in keys if name in {*_SCHEMA.names, *related}]
    taken += [name for name in keys if f"related_{name}" in _SCHEMA.names]
    if taken:
        raise InputError(f"key column '{taken[0]}' has the name of an output column: choose other --key columns")


def findings_table(findings: Sequence[Finding], table: Table) -> pa.Table:
    """A row for each finding: `kind`, `task`, `rank` within both, `row` as counted in its file, the key columns,
    `given`, `suggested`, `score`, `likely`, `related_row`, the key columns of that row under `related_NAME`, `note`.

    Raises:
        InputError: a key column has the name of another column.
    """
    rank: dict[tuple[str, str | None], int] = {}
    columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
    for finding in findings:
        of = finding.kind, finding.task
        rank[of] = rank.get(of, 0) + 1
        related = None if finding.related is None else table.row_number(finding.related)
        told = vars(finding) | {"rank": rank[of], "row": table.row_number(finding.row), "related_row": related}
        for name, values in columns.items():
            values.append(told[name])
    found = pa.table(columns, schema=_SCHEMA)
    check_keys(table)
    keys = table.key_columns()
    rows = pa.array([finding.row for finding in findings], pa.int64())
    others = pa.array([finding.related for finding in findings], pa.int64())
    named = {name: column.take(rows) for name, column in zip(keys.column_names, keys.columns, strict=True)}
    named |= {f"related_{name}": keys.column(name).take(others) for name in keys.column_names}
    for name, values in named.items():
        found = found.append_column(name, values)
    order = ["kind", "task", "rank", "row", *keys.column_names, "given", "suggested", "score", "likely", "related_row"]
    return found.select([*order, *(name for name in named if name not in keys.column_names), "note"])


def write_findings(findings: Sequence[Finding], table: Table, path: Path) -> None:
    """Writes them as Parquet, whole or not at all.

    Raises:
        InputError: as `findings_table`; the file cannot be written.
    """
    found = findings_table(findings, table)
    with replacing(path) as temporary:
        pq.write_table(found, temporary)


def audit_view(
    findings: Sequence[Finding],
    table: Table,
    limit: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[AuditRow]:
    """The first `limit` findings of each kind and task, with the pictures of their rows.

    Raises:
        InputError: a picture cannot be read.
    """
    ranks: dict[tuple[str, str | None], int] = {}
    shown: list[tuple[Finding, int]] = []
    for finding in findings:
        of = finding.kind, finding.task
        ranks[of] = ranks.get(of, 0) + 1
        if ranks[of] <= limit:
            shown.append((finding, ranks[of]))
    rows = sorted({row for finding, _ in shown for row in (finding.row, finding.related) if row is not None})
    views: dict[int, RowView] = {}
    for done, row in enumerate(rows, 1):
        picture = table.image(row)
        if picture is not None:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
        keys = [str(value) for value in table.keys(row).values()]
        views[row] = RowView(table.row_number(row), keys, table.text(row), picture)
        progress("drawing pictures", done, len(rows))
    return [
        AuditRow(
            kind=finding.kind,
            task=finding.task,
            rank=rank,
            row=views[finding.row],
            score=finding.score,
            given=finding.given,
            suggested=finding.suggested,
            likely=finding.likely,
            related=None if finding.related is None else views[finding.related],
            note=finding.note,
        )
        for finding, rank in shown
    ]
