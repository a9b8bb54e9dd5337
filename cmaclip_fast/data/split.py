"""Train, validation and test rows: by a column if there is one, else at random, stratified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cmaclip_fast.data.files import SPLITS, near
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError, clipped

NAMES = ("train", "validation", "test")
CARVED = 0.1
"""The part of the training rows that becomes the validation split where the split column names none."""


def split_table(
    table: Table,
    split_column: str | None = None,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> dict[str, Table]:
    """The rows as `{"train", "validation", "test"}`; the same rows, seed and fractions give the same splits.

    With a split column (`split_column`, or the table's own) its values decide: train, validation (also valid, val,
    dev) and test, in any case. Where no row is for validation, a tenth of the training rows is. Without one, rows are
    drawn at random, stratified by the first task; a class's only row is for training. A split may be empty.

    Raises:
        InputError: the column is missing, or holds something else than a split.
        ValueError: fractions that are negative or do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions {fractions} must be non-negative and sum to 1")
    column = split_column or table.columns.split
    if column is None:
        parts = _stratified(_strata(table, range(len(table))), fractions, seed)
    else:
        parts = _by_column(table, column)
        if parts[0] and not parts[1]:
            parts[0], parts[1], _ = _stratified(_strata(table, parts[0]), (1 - CARVED, CARVED, 0.0), seed)
    return {name: table.select(rows) for name, rows in zip(NAMES, parts, strict=True)}


def _by_column(table: Table, column: str) -> list[list[int]]:
    parts: dict[str, list[int]] = {name: [] for name in NAMES}
    for row, value in enumerate(table.splits(column)):
        split = SPLITS.get((value or "").lower())
        if split is None:
            given = value or ""
            raise InputError(
                f"{table.where(row)}, column '{column}': '{clipped(given)}' is no split{near(given, SPLITS)}; "
                "write train, validation or test"
            )
        parts[split].append(row)
    return list(parts.values())


def _strata(table: Table, rows: Sequence[int]) -> list[list[int]]:
    """`rows` grouped by their class of the first task; the unlabelled are a group of their own.

    Of several classes the rarest counts.
    """
    first = table.columns.tasks[0] if table.columns.tasks else None
    labels: Sequence[str | None] = [None] * len(table)
    if first in table.columns.multi_label:
        lists = table.label_lists(first)
        counts = Counter(name for names in lists for name in names or ())
        labels = [min(names, key=lambda name: (counts[name], name)) if names else None for names in lists]
    elif first is not None:
        labels = table.labels(first)
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(labels[row] or "", []).append(row)
    return [groups[name] for name in sorted(groups)]


def _stratified(groups: list[list[int]], fractions: tuple[float, float, float], seed: int) -> list[list[int]]:
    """Each group in proportion; what rounding leaves is owed to the next group, so that the sums are right too."""
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[], [], []]
    owed = np.zeros(3)
    for group in groups:
        shuffled = [group[i] for i in generator.permutation(len(group))]
        owed += len(group) * np.asarray(fractions)
        test = int(np.clip(round(owed[2]), 0, len(group) - 1))
        validation = int(np.clip(round(owed[1]), 0, len(group) - 1 - test))
        sizes = (len(group) - validation - test, validation, test)
        owed -= sizes
        for part, start, size in zip((2, 1, 0), (0, test, test + validation), reversed(sizes), strict=True):
            parts[part] += shuffled[start : start + size]
    return [sorted(part) for part in parts]
