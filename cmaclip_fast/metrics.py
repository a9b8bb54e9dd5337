"""Accuracy, macro-F1, and recall at a fixed precision, for one task at a time.

*Recall at a fixed precision*, over a task (micro; the paper's table 2): a row's confidence is the probability of its
predicted class. Rows at or above a threshold are answered, the others are not. Precision is the share of the answered
rows that are right, recall the share of all labelled rows that are answered and right. Reported is the highest recall
over all thresholds whose precision reaches the target; 0 where none does. *Per class* it is the usual one-versus-rest
curve over the probability of that class.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_precision_recall_curve,
    binary_recall_at_fixed_precision,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multiclass_recall_at_fixed_precision,
)

UNREACHED = 1.0e6
"""The threshold that torchmetrics gives where no threshold reaches the precision."""


@dataclass
class TaskMetrics:
    """What a task's predictions are worth on its labelled rows.

    Attributes:
        rows: labelled rows.
        accuracy: share of them that are right.
        macro_f1: mean F1 of the classes that occur among labels or predictions.
        recall_at_precision: highest micro recall whose precision reaches the target.
        threshold: the confidence where it is reached, or None.
        class_rows, class_precision, class_recall, class_f1: `[C]`, at the most probable class.
        class_recall_at_precision: `[C]`, one versus rest; NaN for a class without rows.
        class_threshold: the probability where it is reached, or None, for each class.
        confusion: `[C, C]` counts, truth by prediction.
    """

    rows: int
    accuracy: float
    macro_f1: float
    recall_at_precision: float
    threshold: float | None
    class_rows: Tensor
    class_precision: Tensor
    class_recall: Tensor
    class_f1: Tensor
    class_recall_at_precision: Tensor
    class_threshold: list[float | None]
    confusion: Tensor

    def headline(self) -> dict[str, float]:
        """The four numbers that stand in tables."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "recall_at_precision": self.recall_at_precision,
            "rows": self.rows,
        }


def task_metrics(probabilities: Tensor, labels: Tensor, target_precision: float = 0.9) -> TaskMetrics:
    """Metrics of one task.

    Args:
        probabilities: `[N, C]`, rows sum to 1.
        labels: `[N]` int64, -1 where unlabelled.
        target_precision: for recall at a fixed precision, in (0, 1].
    """
    classes = probabilities.shape[1]
    labelled = labels >= 0
    probabilities, labels = probabilities[labelled].float(), labels[labelled]
    if len(labels) == 0:
        nothing = torch.zeros(classes)
        unreached: list[float | None] = [None] * classes
        counts = torch.zeros(classes, classes, dtype=torch.long)
        return TaskMetrics(
            0, 0.0, 0.0, 0.0, None, nothing.long(), nothing, nothing, nothing, nothing, unreached, counts
        )
    predicted = probabilities.argmax(1)
    recall, threshold = micro_recall_at_precision(probabilities, labels, target_precision)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive samples")  # those classes are left out just below
        class_recall_at, class_thresholds = multiclass_recall_at_fixed_precision(
            probabilities, labels, num_classes=classes, min_precision=target_precision
        )
    class_rows = torch.bincount(labels, minlength=classes)
    class_recall_at = class_recall_at.where(class_rows > 0, torch.nan)
    class_thresholds = class_thresholds.where(class_rows > 0, UNREACHED)
    return TaskMetrics(
        rows=len(labels),
        accuracy=float(multiclass_accuracy(predicted, labels, classes, average="micro")),
        macro_f1=float(multiclass_f1_score(predicted, labels, classes, average="macro")),
        recall_at_precision=recall,
        threshold=threshold,
        class_rows=class_rows,
        class_precision=multiclass_precision(predicted, labels, classes, average="none"),
        class_recall=multiclass_recall(predicted, labels, classes, average="none"),
        class_f1=multiclass_f1_score(predicted, labels, classes, average="none"),
        class_recall_at_precision=class_recall_at,
        class_threshold=[None if t >= UNREACHED else float(t) for t in class_thresholds],
        confusion=multiclass_confusion_matrix(predicted, labels, classes),
    )


def micro_recall_at_precision(probabilities: Tensor, labels: Tensor, target: float) -> tuple[float, float | None]:
    """Highest recall over confidence thresholds whose precision is at least `target`, and the threshold.

    The binary curve of 'the prediction is right' over confidence has the precision wanted here; its recall is a
    share of the right rows, hence the factor.
    """
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).long()
    if not right.any():
        return 0.0, None
    recall, threshold = binary_recall_at_fixed_precision(confidence, right, min_precision=target)
    if threshold >= UNREACHED or recall == 0:
        return 0.0, None
    return float(recall * right.float().mean()), float(threshold)


def micro_curve(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of a task at every confidence threshold, as `micro_recall_at_precision` defines them."""
    labelled = labels >= 0
    confidence, predicted = probabilities[labelled].max(1)
    right = (predicted == labels[labelled]).long()
    if not right.any():
        return torch.zeros(1), torch.zeros(1)
    precision, recall, _ = binary_precision_recall_curve(confidence, right)
    return precision, recall * right.float().mean()
