"""Accuracy, macro-F1, and recall at a fixed precision, for one task at a time.

*Recall at a fixed precision*, over a task (micro; the paper's table 2): a row's confidence is the probability of its
predicted class. Rows at or above a threshold are answered, the others are not. Precision is the share of the answered
rows that are right, recall the share of all labelled rows that are answered and right. Reported is the highest recall
over all thresholds whose precision reaches the target; 0 where none does. *Per class* it is the usual one-versus-rest
curve over the probability of that class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_precision_recall_curve

_SORTED_AT_ONCE = 2**24
"""Scores that are sorted at a time, which bounds memory where there are thousands of classes."""


@dataclass
class TaskMetrics:
    """Metrics of a task on its labelled rows.

    Attributes:
        rows: labelled rows.
        accuracy: share of them that are right.
        macro_f1: mean F1 of the classes that occur among labels or predictions.
        recall_at_precision: highest micro recall whose precision reaches the target.
        class_rows, class_precision, class_recall, class_f1: `[C]`, at the most probable class.
        class_recall_at_precision: `[C]`, one versus rest; NaN for a class without rows.
        confusion: sparse `[C, C]` counts, truth by prediction.
    """

    rows: int
    accuracy: float
    macro_f1: float
    recall_at_precision: float
    class_rows: Tensor
    class_precision: Tensor
    class_recall: Tensor
    class_f1: Tensor
    class_recall_at_precision: Tensor
    confusion: Tensor

    def headline(self) -> dict[str, float]:
        """The four numbers that stand in tables."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "recall_at_precision": self.recall_at_precision,
            "rows": self.rows,
        }

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """For each class its name, rows, precision, recall, F1 and recall at the precision, None where undefined."""
        columns = {
            "class": names,
            "rows": self.class_rows.tolist(),
            "precision": self.class_precision.tolist(),
            "recall": self.class_recall.tolist(),
            "f1": self.class_f1.tolist(),
            "recall_at_precision": [None if math.isnan(v) else v for v in self.class_recall_at_precision.tolist()],
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def task_metrics(probabilities: Tensor, labels: Tensor, target_precision: float = 0.9) -> TaskMetrics:
    """Metrics of one task.

    Args:
        probabilities: `[N, C]`, rows sum to 1.
        labels: `[N]` int64, -1 where unlabelled.
        target_precision: for recall at a fixed precision, in (0, 1].
    """
    classes = probabilities.shape[1]
    confidence, predicted = probabilities.float().max(1)
    found = _metrics(confidence, predicted, labels, classes, target_precision)
    labelled = labels >= 0
    found.class_recall_at_precision = torch.full((classes,), torch.nan)
    chosen = probabilities if labelled.all() else probabilities[labelled]  # of many classes, a copy is large
    _fill_class_recall(chosen.float(), labels[labelled], target_precision, found.class_recall_at_precision)
    return found


def headline_metrics(
    confidence: Tensor, predicted: Tensor, labels: Tensor, target_precision: float = 0.9
) -> dict[str, float]:
    """The headline of `task_metrics`, from the most probable class of each row alone.

    Args:
        confidence, predicted: `[N]`, the probability of the most probable class, and its number.
        labels: `[N]` int64, -1 where unlabelled.
    """
    labelled = labels >= 0
    # only the classes that occur, since there may be thousands for a few rows
    names, numbers = torch.cat([predicted[labelled], labels[labelled]]).unique(return_inverse=True)
    predicted, labels = numbers.tensor_split(2)
    return _metrics(confidence[labelled], predicted, labels, len(names), target_precision).headline()


def _metrics(confidence: Tensor, predicted: Tensor, labels: Tensor, classes: int, target: float) -> TaskMetrics:
    """All but the curves of single classes."""
    labelled = labels >= 0
    confidence, predicted, labels = confidence[labelled], predicted[labelled], labels[labelled]
    right = predicted == labels
    recall = micro_recall_at_precision(confidence, right, target)
    hits = torch.bincount(labels[right], minlength=classes)
    class_rows, predictions = (torch.bincount(numbers, minlength=classes) for numbers in (labels, predicted))
    f1 = 2 * hits / (class_rows + predictions).clamp_min(1)
    seen = class_rows + predictions > 0
    pairs = torch.stack([labels, predicted])
    return TaskMetrics(
        rows=len(labels),
        accuracy=float(right.float().mean()) if len(labels) else 0.0,
        macro_f1=float(f1[seen].mean()) if len(labels) else 0.0,
        recall_at_precision=recall,
        class_rows=class_rows,
        class_precision=hits / predictions.clamp_min(1),
        class_recall=hits / class_rows.clamp_min(1),
        class_f1=f1,
        class_recall_at_precision=torch.full((classes,), torch.nan),
        confusion=torch.sparse_coo_tensor(
            pairs, torch.ones_like(labels), (classes, classes), check_invariants=True
        ).coalesce(),
    )


def _fill_class_recall(probabilities: Tensor, labels: Tensor, target: float, recall_at: Tensor) -> None:
    """Sets the highest recall of each class that has rows, one versus rest.

    What torchmetrics' `multiclass_recall_at_fixed_precision` gives, for many classes at a time.
    """
    if len(labels) == 0:
        return
    for part in labels.unique().split(max(1, _SORTED_AT_ONCE // max(1, len(labels)))):
        scores, order = probabilities[:, part].T.contiguous().sort(dim=1, descending=True)
        hits = (labels[order] == part[:, None]).cumsum(1)
        recall_at[part] = _most_hits(scores, hits, target) / hits[:, -1]


def micro_recall_at_precision(confidence: Tensor, right: Tensor, target: float) -> float:
    """Highest recall over confidence thresholds whose precision is at least `target`.

    From the confidence `[N]` of each labelled row and whether it is right, `[N]` bool.
    """
    if len(right) == 0:
        return 0.0
    scores, order = confidence.sort(descending=True)
    return int(_most_hits(scores[None], right[order].cumsum(0)[None], target)) / len(right)


def _most_hits(scores: Tensor, hits: Tensor, target: float) -> Tensor:
    """The most hits at a threshold whose precision is at least `target`, `[K]`; 0 where there is none.

    Of scores that fall, `[K, N]`, and the number of hits among the first 1, 2, ... N of them.
    """
    # rows of the same score are answered together
    whole = torch.cat([scores[:, 1:] != scores[:, :-1], torch.ones(len(scores), 1, dtype=torch.bool)], dim=1)
    return hits.where(whole & (hits / torch.arange(1, hits.shape[1] + 1) >= target), 0).amax(1)


def micro_curve(confidence: Tensor, predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of a task at every confidence threshold, as `micro_recall_at_precision` defines them.

    Takes what `headline_metrics` does.
    """
    labelled = labels >= 0
    confidence, right = confidence[labelled], (predicted == labels)[labelled].long()
    if not right.any():
        return torch.zeros(1), torch.zeros(1)
    precision, recall, _ = binary_precision_recall_curve(confidence, right)
    return precision, recall * right.float().mean()
