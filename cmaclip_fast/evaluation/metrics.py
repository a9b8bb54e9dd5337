"""Accuracy, macro-F1, and recall at a fixed precision, for one task at a time.

*Recall at a fixed precision*, over a task (micro; the paper's table 2): a row's confidence is the probability of its
predicted class. Rows at or above a threshold are answered, the others are not. Precision is the share of the answered
rows that are right, recall the share of all labelled rows that are answered and right. Reported is the highest recall
over all thresholds whose precision reaches the target; 0 where none does. *Per class* it is the usual one-versus-rest
curve over the probability of that class.

Of a *multi-label task*, whose rows have any number of classes, a class is predicted where its probability is 0.5 or
more, accuracy is the share of rows whose whole set is right, and recall at a fixed precision counts pairs of a row and
a class: those whose probability reaches the threshold are answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
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
        class_rows, class_precision, class_recall, class_f1: `[C]`, at the most probable class, or of a multi-label task
            at the classes that are predicted.
        class_recall_at_precision: `[C]`, one versus rest; NaN for a class without rows.
        confusion: sparse `[C, C]` counts, truth by prediction; None for a multi-label task.
        micro_f1: of a multi-label task, the F1 over all pairs of a row and a class; None for other tasks.
        mean_average_precision: of a multi-label task, the mean over the classes that have rows; None for other tasks.
        class_average_precision: of a multi-label task `[C]`, NaN for a class without rows; None for other tasks.
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
    confusion: Tensor | None
    micro_f1: float | None = None
    mean_average_precision: float | None = None
    class_average_precision: Tensor | None = None

    def headline(self) -> dict[str, float]:
        """The four numbers that stand in tables; of a multi-label task two more."""
        several = {"micro_f1": self.micro_f1, "mean_average_precision": self.mean_average_precision}
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "recall_at_precision": self.recall_at_precision,
            "rows": self.rows,
            **{name: value for name, value in several.items() if value is not None},
        }

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """For each class its name, rows, precision, recall, F1 and recall at the precision, None where undefined.

        Of a multi-label task the average precision too.
        """
        columns: dict[str, Sequence[Any]] = {
            "class": names,
            "rows": self.class_rows.tolist(),
            "precision": self.class_precision.tolist(),
            "recall": self.class_recall.tolist(),
            "f1": self.class_f1.tolist(),
            "recall_at_precision": [None if math.isnan(v) else v for v in self.class_recall_at_precision.tolist()],
        }
        if self.class_average_precision is not None:
            found = self.class_average_precision.tolist()
            columns["average_precision"] = [None if math.isnan(value) else value for value in found]
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
    known = labels[labelled]
    _fill_class_recall(
        chosen.float(),
        known.unique(),
        lambda part: known == part[:, None],
        target_precision,
        found.class_recall_at_precision,
    )
    return found


def multi_label_metrics(scores: Tensor, labels: Tensor, target_precision: float = 0.9) -> TaskMetrics:
    """Metrics of one multi-label task.

    Args:
        scores: `[N, C]`, the probability of each class.
        labels: `[N, C]` int8, 1 where the row has the class, 0 where it has not, -1 in unlabelled rows.
        target_precision: for recall at a fixed precision, in (0, 1].
    """
    classes = labels.shape[1]
    known = (labels >= 0).any(1)
    scores, has = scores[known].float(), labels[known] == 1
    said = scores >= 0.5
    hits, class_rows, predictions = ((mask.sum(0)) for mask in (has & said, has, said))
    f1 = 2 * hits / (class_rows + predictions).clamp_min(1)
    seen = class_rows + predictions > 0
    there = (class_rows > 0).nonzero().flatten()
    average = torch.full((classes,), torch.nan)
    recall_at = torch.full((classes,), torch.nan)
    recall = 0.0
    if len(there):
        precisions = average_precision_score(has[:, there].numpy(), scores[:, there].numpy(), average=None)
        average[there] = torch.from_numpy(np.atleast_1d(precisions)).float()
        _fill_class_recall(scores, there, lambda part: has[:, part].T, target_precision, recall_at)
        recall = _recall_of_pairs(scores.flatten(), has.flatten(), target_precision)
    return TaskMetrics(
        rows=len(scores),
        accuracy=float((has == said).all(1).float().mean()) if len(scores) else 0.0,
        macro_f1=float(f1[seen].mean()) if seen.any() else 0.0,
        recall_at_precision=recall,
        class_rows=class_rows,
        class_precision=hits / predictions.clamp_min(1),
        class_recall=hits / class_rows.clamp_min(1),
        class_f1=f1,
        class_recall_at_precision=recall_at,
        confusion=None,
        micro_f1=float(2 * hits.sum() / (class_rows + predictions).sum().clamp_min(1)),
        mean_average_precision=float(average[there].mean()) if len(there) else 0.0,
        class_average_precision=average,
    )


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


def _fill_class_recall(
    probabilities: Tensor, there: Tensor, has: Callable[[Tensor], Tensor], target: float, recall_at: Tensor
) -> None:
    """Sets the highest recall of each class that has rows, one versus rest.

    What torchmetrics' `multiclass_recall_at_fixed_precision` gives, for many classes at a time.

    Args:
        there: the classes that have rows.
        has: of the numbers of some classes `[K]`, which of the rows have each, `[K, N]` bool.
    """
    if len(there) == 0:
        return
    for part in there.split(max(1, _SORTED_AT_ONCE // max(1, len(probabilities)))):
        scores, order = probabilities[:, part].T.contiguous().sort(dim=1, descending=True)
        hits = has(part).gather(1, order).cumsum(1)
        recall_at[part] = _most_hits(scores, hits, target) / hits[:, -1]


def micro_recall_at_precision(confidence: Tensor, right: Tensor, target: float) -> float:
    """Highest recall over confidence thresholds whose precision is at least `target`.

    From the confidence `[N]` of each labelled row and whether it is right, `[N]` bool.
    """
    return _recall_of_pairs(confidence, right, target, len(right)) if len(right) else 0.0


def _recall_of_pairs(scores: Tensor, right: Tensor, target: float, most: int | None = None) -> float:
    """The most hits at a precision of `target`, as a share of `most`, or of all that are right."""
    ordered, order = scores.sort(descending=True)
    hits = _most_hits(ordered[None], right[order].cumsum(0)[None], target)
    return int(hits) / (int(right.sum()) if most is None else most)


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


def pair_curve(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of a multi-label task at every threshold, over the pairs of a row and a class.

    Takes what `multi_label_metrics` does.
    """
    known = labels >= 0
    if not (labels == 1).any():
        return torch.zeros(1), torch.zeros(1)
    precision, recall, _ = binary_precision_recall_curve(scores[known].float(), labels[known].long())
    return precision, recall
