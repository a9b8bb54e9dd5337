"""Metrics against scikit-learn and against a plain search over thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cmaclip_fast.evaluation.metrics import headline_metrics, micro_curve, task_metrics


def draw(seed: int, rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (rows,), generator=generator)
    logits = torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), labels.clamp(min=0)] += 1.5
    return (logits * 2).round().div(2).softmax(1), labels  # rounded, so that confidences tie


def search(probabilities: np.ndarray, labels: np.ndarray, target: float) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    best = 0.0
    for threshold in np.unique(confidence):
        answered = confidence >= threshold
        if right[answered].mean() >= target:
            best = max(best, (answered & right).mean())
    return best


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000), rows=st.integers(2, 60), classes=st.integers(2, 6), target=st.sampled_from([0.5, 0.9])
)
def test_recall_at_precision_is_the_best_over_all_thresholds(seed: int, rows: int, classes: int, target: float) -> None:
    probabilities, labels = draw(seed, rows, classes)
    found = task_metrics(probabilities, labels, target)
    assert headline_metrics(*probabilities.max(1), labels, target) == found.headline()
    known = labels >= 0
    if known.sum() == 0:
        assert found.rows == 0
        return
    p, y = probabilities[known].numpy(), labels[known].numpy()
    assert found.recall_at_precision == pytest.approx(search(p, y, target), abs=1e-6)
    assert found.accuracy == pytest.approx(sk.accuracy_score(y, p.argmax(1)))
    assert found.macro_f1 == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro", zero_division=0), abs=1e-6)
    assert found.confusion.to_dense().tolist() == sk.confusion_matrix(y, p.argmax(1), labels=range(classes)).tolist()


def test_unlabelled_rows_do_not_count() -> None:
    probabilities, labels = draw(3, 40, 4)
    known = labels >= 0
    assert 0 < known.sum() < 40
    assert (
        task_metrics(probabilities, labels).headline() == task_metrics(probabilities[known], labels[known]).headline()
    )


def test_no_labelled_row_and_no_right_row() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    assert task_metrics(probabilities, torch.tensor([-1, -1])).rows == 0
    wrong = task_metrics(probabilities, torch.tensor([1, 1]))
    assert (wrong.accuracy, wrong.recall_at_precision) == (0.0, 0.0)


def test_curve_ends_where_everything_is_answered() -> None:
    probabilities, labels = draw(5, 50, 3)
    precision, recall = micro_curve(*probabilities.max(1), labels)
    accuracy = task_metrics(probabilities, labels).accuracy
    assert float(recall.max()) == pytest.approx(accuracy) and float(precision[0]) == pytest.approx(accuracy)
