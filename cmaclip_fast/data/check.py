"""A pass over the rows before work is begun, so that bad input ends a run in its first minute, not its last."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

from cmaclip_fast.data.images import ImageProblem
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError

RowPolicy = Literal["error", "skip", "mask"]
"""How bad rows are handled: an error, removal, or (if only the picture is bad) a row without a picture."""

_ROWS_AT_ONCE = 256


def check_rows(
    table: Table, policy: RowPolicy = "error", progress: Callable[[int, int], None] | None = None
) -> tuple[Table, dict[str, int]]:
    """Reads every picture to its end and looks for rows with neither text nor picture.

    Args:
        policy: `error` raises at the first bad row; `skip` drops bad rows; `mask` takes an unreadable or oversized
            picture for absent, and drops the row where no text is left.
        progress: called with the rows done and the rows in all.

    Returns:
        The rows to use, and how many rows had an `unreadable_image`, an `oversized_image` or were an `empty_row`;
        kinds that did not occur are left out.

    Raises:
        InputError: the first bad row under `error`; or no row is left.
        ValueError: an unknown policy.
    """
    checked, _, counts = usable_rows(table, policy, progress)
    if len(checked) == 0:
        raise InputError(f"{table.name}: no usable row is left ({tally(counts)}); fix the rows")
    return checked, counts


def usable_rows(
    table: Table, policy: RowPolicy = "error", progress: Callable[[int, int], None] | None = None
) -> tuple[Table, list[int], dict[str, int]]:
    """As `check_rows`, but gives the numbers of the rows to use too, and there may be none."""
    if policy not in get_args(RowPolicy):
        raise ValueError(f"policy '{policy}' is unknown; use one of {', '.join(get_args(RowPolicy))}")
    counts: Counter[str] = Counter()
    dropped: set[int] = set()
    masked: list[int] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
        for start in range(0, len(table), _ROWS_AT_ONCE):
            rows = range(start, min(start + _ROWS_AT_ONCE, len(table)))
            for row, problem in zip(rows, pool.map(table.image_problem, rows), strict=True):
                kind = _bad_kind(table, row, problem)
                if kind is None:
                    continue
                if policy == "error":
                    raise InputError(_message(table, row, problem))
                counts[kind] += 1
                if policy == "mask" and problem is not None and table.text(row) is not None:
                    masked.append(row)
                else:
                    dropped.add(row)
            if progress is not None:
                progress(rows.stop, len(table))
    checked = table.mask_images(masked) if masked else table
    used = [row for row in range(len(table)) if row not in dropped]
    return checked.select(used), used, dict(counts)


def _bad_kind(table: Table, row: int, problem: ImageProblem | None) -> str | None:
    if problem is not None:
        return problem.kind
    return None if table.text(row) is not None or table.has_image(row) else "empty_row"


def _message(table: Table, row: int, problem: ImageProblem | None) -> str:
    remedy = "or leave such rows out with on_bad_rows skip"
    if problem is not None:
        return f"{table.describe_image_problem(row, problem)}, {remedy} or mask"
    columns = " and ".join(f"'{c}'" for c in (table.columns.text, table.columns.image) if c is not None)
    return f"{table.where(row)}, column {columns}: neither text nor picture; fill one in, {remedy}"


def tally(counts: Mapping[str, int]) -> str:
    """`kind: number` of each kind that occurred, on one line."""
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items()) if count) or "the table is empty"
