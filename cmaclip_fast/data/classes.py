"""Class names to class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

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
        names[task] = before + sorted({label for label in table.labels(task) if label is not None} - set(before))
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
        `[N]` int64, -1 where unlabelled, and the number of rows whose class was ignored.

    Raises:
        InputError: an unknown class, under `error`.
    """
    numbers = {name: number for number, name in enumerate(names)}
    encoded, ignored = [], 0
    for row, label in enumerate(table.labels(task)):
        if label is not None and label not in numbers:
            if unknown == "error":
                raise InputError(
                    f"{table.where(row)}, column '{task}': class '{clipped(label)}' is not one of the {len(names)} "
                    f"that the model knows{near(label, names)}; fix the label, or ignore unknown classes"
                )
            ignored += 1
        encoded.append(numbers.get(label, UNLABELLED) if label is not None else UNLABELLED)
    return torch.tensor(encoded, dtype=torch.int64), ignored
