"""Thresholds of confidence above which a task's answers are right as often as promised.

A threshold is not taken where the precision on the validation rows happens to reach the target, which small samples do
by luck, but where it is shown to: for each candidate, the one-sided exact lower bound of Clopper and Pearson on the
precision of the rows at or above it must reach the target. Candidates are tested in a fixed order, from few accepted
rows to many, so that with probability `ASSURANCE` each one that passes keeps the promise (Angelopoulos et al., "Learn
then Test", arXiv 2110.01052, section 3.1). Half of the error probability is given to the smallest number of rows that
can pass, half to the middle of the rows, so that one wrong answer at the top does not cost a task that is nearly always
right. A test that passes hands what it has on to the next, one that fails loses it (the fallback procedure of Wiens and
Dmitrienko, 2005).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta
from torch import Tensor

ASSURANCE = 0.9
"""Probability that the precision reaches the target on rows like the validation rows."""

MIN_CLASS_ROWS = 5
"""A class with fewer labelled validation rows has no threshold of its own."""

_GROWTH = 1.05
"""Of the number of accepted rows from one candidate to the next."""


@dataclass(frozen=True)
class Threshold:
    """The lowest confidence that is accepted.

    Attributes:
        value: the confidence; None where no threshold reaches the target, so that nothing is accepted.
        rows: labelled validation rows.
        accepted: rows among them at or above it.
        right: rows among those whose answer is right.
    """

    value: float | None
    rows: int
    accepted: int = 0
    right: int = 0


def precision_bound(right: np.ndarray | int, rows: np.ndarray | int, error: float) -> np.ndarray:
    """The lower bound of Clopper and Pearson on a precision, missed with probability `error` at most."""
    right, rows = np.asarray(right), np.asarray(rows)
    return np.where(right > 0, beta.ppf(error, np.maximum(right, 1), rows - right + 1), 0.0)


def rows_needed(target: float, error: float) -> int:
    """The fewest rows that, all being right, show a precision of `target`; more than there can be for 1."""
    return math.ceil(math.log(error) / math.log(target) - 1e-9) if target < 1 else sys.maxsize


def choose_threshold(confidence: Tensor, right: Tensor, target: float, assurance: float = ASSURANCE) -> Threshold:
    """The threshold that accepts the most rows among those that keep the promise.

    Args:
        confidence: `[N]`, of the labelled rows.
        right: `[N]` bool.
        target: precision to keep, in (0, 1]. A precision of 1 cannot be shown by a sample: nothing is accepted.
    """
    order = confidence.argsort(descending=True)
    scores, hits = confidence[order].numpy(), np.cumsum(right[order].numpy())
    rows = len(scores)
    starts = _starts(rows, target, 1 - assurance)
    if not starts:
        return Threshold(None, rows)
    # rows of the same score are accepted together
    whole = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) + 1
    first = min(starts)
    sizes = np.ceil(first * _GROWTH ** np.arange(math.log(rows / first, _GROWTH) + 2)).clip(max=rows)
    tested = np.unique(whole[np.searchsorted(whole, [*sizes, *starts])])
    shares = dict(zip(whole[np.searchsorted(whole, [*starts])].tolist(), starts.values(), strict=True))
    best, error = 0, 0.0
    for size in tested.tolist():
        error += shares.get(size, 0.0)
        if error and precision_bound(hits[size - 1], size, error) >= target:
            best = size
        else:
            error = 0.0
    if not best:
        return Threshold(None, rows)
    return Threshold(float(scores[best - 1]), rows, best, int(hits[best - 1]))


def _starts(rows: int, target: float, error: float) -> dict[int, float]:
    """The numbers of accepted rows at which testing starts, with the error probability of each; none for few rows."""
    first, middle = rows_needed(target, error / 2), rows // 2
    if middle > first:
        return {first: error / 2, middle: error / 2}
    first = rows_needed(target, error)
    return {first: error} if first <= rows else {}


def choose_class_thresholds(
    confidence: Tensor, predicted: Tensor, labels: Tensor, target: float, assurance: float = ASSURANCE
) -> dict[int, Threshold]:
    """A threshold for each class that has enough rows for one; the others are left to the task's.

    A class needs `MIN_CLASS_ROWS` labelled rows, and as many rows that are predicted as it as can show the target.

    Args:
        confidence, predicted, labels: `[N]`, of the labelled rows.
    """
    fewest = rows_needed(target, 1 - assurance)
    known = labels.bincount(minlength=int(predicted.max()) + 1 if len(predicted) else 0)
    found = {}
    for number in predicted.unique().tolist():
        rows = predicted == number
        if known[number] >= MIN_CLASS_ROWS and rows.sum() >= fewest:
            found[number] = choose_threshold(confidence[rows], labels[rows] == number, target, assurance)
    return found


def choose_label_thresholds(
    scores: Tensor, has: Tensor, target: float, assurance: float = ASSURANCE
) -> dict[int, Threshold]:
    """As `choose_class_thresholds`, for a multi-label task: a class is predicted where its probability is 0.5 or more.

    Args:
        scores, has: `[N, C]`, of the labelled rows: the probability of each class, and whether the row has it.
    """
    fewest = rows_needed(target, 1 - assurance)
    enough = (has.sum(0) >= MIN_CLASS_ROWS) & ((scores >= 0.5).sum(0) >= fewest)
    return {
        number: choose_threshold(scores[:, number], has[:, number], target, assurance)
        for number in enough.nonzero().flatten().tolist()
    }
