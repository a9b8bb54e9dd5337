"""Classes of unequal size: weights of the loss, adjusted logits, and rows drawn so that rare classes come as often."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cmaclip_fast.data.files import near
from cmaclip_fast.errors import InputError, clipped
from cmaclip_fast.untrusted import read_json

MAX_WEIGHT_FILE_BYTES = 16 * 2**20

Scheme = Literal["balanced", "effective-number"]
Weights = dict[str, dict[str, float]]
"""For some tasks, the weights of some of their classes."""


def class_counts(labels: Mapping[str, Tensor], tasks: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """For each task `[C_task]` int64, the labelled rows of each class."""
    return {
        task: (labels[task] == 1).sum(0)
        if labels[task].ndim == 2
        else torch.bincount(labels[task][labels[task] >= 0], minlength=len(classes))
        for task, classes in tasks.items()
    }


def class_weights(
    scheme: Scheme | Weights, counts: Mapping[str, Tensor], tasks: Mapping[str, Sequence[str]], beta: float = 0.999
) -> Tensor:
    """The weight of each class in the loss, those of all tasks side by side: `[C]` float32.

    `balanced` weighs a class by `N / (C_task * n)`, where n of the task's N labelled rows have it, as scikit-learn
    does; `effective-number` by `(1 - beta) / (1 - beta ** n)` (Cui et al., arXiv 1901.05555, equation 2). Both are
    scaled so that their mean over the labelled rows is 1. Weights that are given are used as they are, 1 for classes
    that are not named. A class without rows has the weight 1; it has no loss.

    Args:
        counts: of each task, as `class_counts` gives them.
        tasks: the classes of each task.

    Raises:
        InputError: weights are given for an unknown task or class, or are negative, infinite, or all 0.
    """
    if isinstance(scheme, dict):
        return torch.cat([_given(scheme, task, classes) for task, classes in _known(scheme, tasks).items()])
    parts = []
    for task in tasks:
        rows = counts[task].double()
        seen = rows > 0
        weights = 1 / rows if scheme == "balanced" else (1 - beta) / (1 - beta**rows)
        weights = weights.where(seen, 0)
        scale = rows.sum() / (rows * weights).sum().clamp_min(1e-12)
        parts.append((weights * scale).where(seen, 1).float())
    return torch.cat(parts)


def _known(given: Weights, tasks: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
    for task in given:
        if task not in tasks:
            raise InputError(f"class weights: no task '{clipped(task)}'{near(task, tasks)}; name one of {list(tasks)}")
    return tasks


def _given(given: Weights, task: str, classes: Sequence[str]) -> Tensor:
    weights = given.get(task, {})
    known = set(classes)
    for name, weight in weights.items():
        if name not in known:
            raise InputError(f"class weights: task '{task}' has no class '{clipped(name)}'{near(name, classes)}")
        if not 0 <= weight < float("inf"):
            raise InputError(f"class weights: '{clipped(name)}' of '{task}' has {weight}: give a number from 0 up")
    found = torch.tensor([float(weights.get(name, 1.0)) for name in classes])
    if not found.any():
        raise InputError(f"class weights: all classes of '{task}' have the weight 0: give one a larger weight")
    return found


def read_class_weights(path: Path) -> Weights:
    """Weights from a JSON file `{TASK: {CLASS: WEIGHT}}`.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    raw: Any = read_json(path, MAX_WEIGHT_FILE_BYTES, remedy="write {TASK: {CLASS: WEIGHT}}", follow_links=True)
    for task, weights in raw.items():
        if not isinstance(weights, dict):
            raise InputError(f"{path}: '{clipped(task)}' is not an object of classes and weights: fix it")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise InputError(f"{path}: the weight of '{clipped(name)}' in '{clipped(task)}' is no number: fix it")
    return {task: {name: float(weight) for name, weight in weights.items()} for task, weights in raw.items()}


def log_priors(counts: Mapping[str, Tensor], multi_label: Collection[str] = ()) -> Tensor:
    """The logarithm of each class's share of its task's labelled rows, `[C]` float32, for logit adjustment.

    Added to the logits in training, times a factor, they leave the model's own logits to say what does not follow from
    how frequent a class is (Menon et al., arXiv 2007.07314, section 4.2). A class without rows counts half a row.
    The classes of a multi-label task exclude none of each other, and have 0.
    """
    parts = []
    for task, rows in counts.items():
        if task in multi_label:
            parts.append(torch.zeros(len(rows)))
            continue
        rows = rows.double().clamp_min(0.5)
        parts.append((rows / rows.sum()).log().float())
    return torch.cat(parts)


def row_weights(labels: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> np.ndarray:
    """`[N]` float64 summing to 1: how often each row is drawn, so that tasks and their classes come equally often.

    Each task gives the same share to each of its classes, and a class the same share to each of its rows; a row has the
    sum of what its labels give it. A row without any label is not drawn.
    """
    total = np.zeros(len(next(iter(labels.values()))))
    for task, of_task in labels.items():
        rows = counts[task].double()
        share = torch.where(rows > 0, 1 / rows.clamp_min(1), 0).numpy()
        if of_task.ndim == 2:
            given = (of_task == 1).numpy() @ share
        else:
            given = np.where(of_task.numpy() >= 0, share[of_task.numpy()], 0)
        total += given / max(1, int((rows > 0).sum()))
    return total / total.sum()
