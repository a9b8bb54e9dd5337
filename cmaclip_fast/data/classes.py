"""Class names to class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmaclip_fast.data.files import near
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError, clipped

UNLABELLED = -1


def class_names(
    table: Table, tasks: Sequence[str], known: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """The classes of each task: those that are known already, in their order, then those that occur, sorted.

    Raises:
        InputError: a task has fewer than two classes.
    """
    names = {}
    for task in tasks:
        before = list((known or {}).get(task, ()))
        names[task] = before + sorted(
            {label for labels in _labels(table, task) for label in labels or ()} - set(before)
        )
    for task, classes in names.items():
        if len(classes) < 2:
            found = f"only the class '{clipped(classes[0])}'" if classes else "no labelled row"
            raise InputError(f"{table.name}, column '{task}': has {found}; a task needs two classes or more")
    return names


def encode(
    table: Table, task: str, names: Sequence[str], unknown: Literal["error", "ignore"] = "error"
) -> tuple[Tensor, int]:
    """The class numbers of every row.

    Args:
        names: the classes of the task, in the order of their numbers.
        unknown: what to do with a class that is not among `names`: raise, or take the row for unlabelled.

    Returns:
        `[N]` int64, -1 where unlabelled; of a multi-label task `[N, C]` int8, 1 where the row has the class, 0 where it
        has not, -1 in the rows without labels. And the number of rows with a class that was ignored; of several classes
        the others count, and a row with none of them is unlabelled.

    Raises:
        InputError: an unknown class, under `error`.
    """
    several = task in table.columns.multi_label
    numbers = {name: number for number, name in enumerate(names)}
    shape = (len(table), len(names)) if several else (len(table),)
    encoded = np.full(shape, UNLABELLED, np.int8 if several else np.int64)
    ignored = 0
    for row, labels in enumerate(_labels(table, task)):
        known = [numbers[label] for label in labels or () if label in numbers]
        if len(known) < len(labels or ()):
            if unknown == "error":
                label = next(label for label in labels or () if label not in numbers)
                raise InputError(
                    f"{table.where(row)}, column '{task}': class '{clipped(label)}' is not one of the {len(names)} "
                    f"that the model knows{near(label, names)}; fix the label, or ignore unknown classes"
                )
            ignored += 1
        if known and several:
            encoded[row] = 0
            encoded[row, known] = 1
        elif known:
            encoded[row] = known[0]
    return torch.from_numpy(encoded), ignored


def labelled(labels: Tensor) -> Tensor:
    """Which rows have a label, `[N]` bool, from labels as `encode` gives them."""
    return labels >= 0 if labels.ndim == 1 else (labels >= 0).any(1)


def _labels(table: Table, task: str) -> list[list[str] | None]:
    if task in table.columns.multi_label:
        return table.label_lists(task)
    return [None if label is None else [label] for label in table.labels(task)]
