"""Line charts, histograms and confusion matrices as SVG, in the reader's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy.sparse import coo_array

from cmaclip_fast.errors import clipped
from cmaclip_fast.pages.page import NAME_LENGTH, finite
from cmaclip_fast.pages.views import TaskView

LABELLED_CLASSES = 20
"""A confusion matrix of more classes than this is drawn without labels, beside the most confused pairs."""

DRAWN_CLASSES = 200
"""A confusion matrix has at most so many classes, those with the most rows."""

_CURVE_POINTS = 240


@dataclass
class _Chart:
    """A line chart in the units of its view box; the template draws it."""

    title: str
    caption: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]  # style, SVG path
    legend: list[tuple[str, str]]  # style, name
    mark: tuple[float, float] | None = None
    rule: float | None = None  # y of a dashed line; the mark's x is then dropped to the axis

    width, height, left, right, top, bottom = 340, 210, 44, 14, 14, 36


def _chart(
    title: str,
    caption: str,
    x_label: str,
    series: Sequence[tuple[str, str, np.ndarray, np.ndarray]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    mark: tuple[float, float] | None = None,
    rule: float | None = None,
    whole_x: bool = False,
) -> _Chart:
    """Lays out `(style, name, xs, ys)` series; a point that is not finite breaks its line."""
    x_steps = _ticks(*x_range, whole=whole_x)
    y_steps = _ticks(*y_range)
    low, high = min(y_range[0], y_steps[0]), max(y_range[1], y_steps[-1])

    def x_at(x: float) -> float:
        span = (x_range[1] - x_range[0]) or 1.0
        return round(_Chart.left + (x - x_range[0]) / span * (_Chart.width - _Chart.left - _Chart.right), 1)

    def y_at(y: float) -> float:
        return round(_Chart.height - _Chart.bottom - (y - low) / (high - low) * _plot_height(), 1)

    lines = []
    for style, _, xs, ys in series:
        path, pen_down = "", False
        for x, y in zip(xs, ys, strict=True):
            if not (math.isfinite(x) and math.isfinite(y)):
                pen_down = False
                continue
            # The zero-length stroke makes a single point visible as a round cap.
            path += f"L{x_at(x)} {y_at(y)}" if pen_down else f"M{x_at(x)} {y_at(y)}h0"
            pen_down = True
        lines.append((style, path))
    return _Chart(
        title,
        caption,
        x_label,
        [(x_at(x), _tick(x)) for x in x_steps if x_range[0] <= x <= x_range[1]],
        [(y_at(y), _tick(y)) for y in y_steps],
        lines,
        [(style, name) for style, name, _, _ in series if len(series) > 1],
        None if mark is None else (x_at(mark[0]), y_at(mark[1])),
        None if rule is None else y_at(rule),
    )


def _tick(value: float) -> str:
    label = f"{value:g}"
    return label if len(label) <= 5 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")


def _plot_height() -> float:
    return _Chart.height - _Chart.top - _Chart.bottom


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    if low == high:
        low, high = (low, low + 1) if whole else (low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9)
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [float(f"{tick:.10g}") for tick in ticks]


def training_curves(history: list[dict[str, float]]) -> list[_Chart]:
    """Loss, accuracy of each task on one common scale, and learning rate, over epochs."""
    if not history:
        return []
    numbers = [finite(entry.get("epoch")) for entry in history]
    epochs = np.array([i + 1 if number is None else number for i, number in enumerate(numbers)], dtype=float)
    columns = {
        name: np.array([math.nan if (value := finite(entry.get(name))) is None else value for entry in history])
        for name in dict.fromkeys(name for entry in history for name in entry)
    }
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    x_range = (float(epochs.min()), float(epochs.max()))

    def over_epochs(
        title: str, best: str, series: list[tuple[str, str, np.ndarray]], y_range: tuple[float, float] | None = None
    ) -> _Chart:
        """A chart whose last series is marked where it is best: `lowest`, `highest`, or nowhere."""
        values, mark, caption = np.concatenate([ys for _, _, ys in series]), None, ""
        if best:
            ys = series[-1][2]
            at = int(np.nanargmin(ys) if best == "lowest" else np.nanargmax(ys))
            mark = (float(epochs[at]), float(ys[at]))
            caption = f"{best} on validation: {ys[at]:.3f} at epoch {epochs[at]:g}"
        laid = [(style, name, epochs, ys) for style, name, ys in series]
        y_range = y_range or (float(np.nanmin(values)), float(np.nanmax(values)))
        return _chart(title, caption, "epoch", laid, x_range, y_range, mark, whole_x=True)

    charts = []
    losses = [
        (style, name, columns[column])
        for style, name, column in (("faint", "train", "train_loss"), ("ink", "validation", "validation_loss"))
        if column in columns
    ]
    if losses:
        charts.append(over_epochs("Loss", "lowest" if "validation_loss" in columns else "", losses))
    accuracies = {name.partition("/")[2]: ys for name, ys in columns.items() if name.startswith("accuracy/")}
    top = max((float(np.nanmax(ys)) for ys in accuracies.values()), default=1.0) or 1.0
    for task, ys in accuracies.items():
        charts.append(
            over_epochs(f"Accuracy, {clipped(task, NAME_LENGTH)}", "highest", [("ink", task, ys)], (0.0, top))
        )
    if "learning_rate" in columns:
        charts.append(over_epochs("Learning rate", "", [("ink", "learning rate", columns["learning_rate"])]))
    return charts


def confusion_matrix_view(task: TaskView) -> dict[str, Any] | None:
    if task.confusion is None:
        return None
    counts, classes = coo_array(task.confusion), [clipped(name, NAME_LENGTH) for name in task.classes]
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"task {task.name}: confusion is {list(counts.shape)}, expected one row and column a class")
    rows = np.maximum(counts.sum(axis=1), 1)
    wrong = np.flatnonzero(counts.row != counts.col)
    # the largest first, and among equals in the order of the matrix
    order = wrong[np.lexsort((counts.col[wrong], counts.row[wrong], -counts.data[wrong]))][:12]
    pairs = [
        (classes[i], classes[j], count, count / rows[i])
        for i, j, count in zip(counts.row[order], counts.col[order], counts.data[order], strict=True)
    ]
    drawn = np.sort(np.argsort(-rows, kind="stable")[:DRAWN_CLASSES])
    cells = counts.tocsr()[drawn][:, drawn].toarray()
    shares = cells / rows[drawn][:, None]
    labelled = len(classes) <= LABELLED_CLASSES
    return {
        "classes": classes,
        "size": len(drawn),
        "all": len(classes),
        "labelled": labelled,
        "cells": [list(zip(row, part, strict=True)) for row, part in zip(cells, shares, strict=True)]
        if labelled
        else [],
        "paths": [] if labelled else _matrix_paths(shares),
        "pairs": [pair for pair in pairs if pair[2] > 0],
    }


def _matrix_paths(shares: np.ndarray, levels: int = 8) -> list[tuple[float, str]]:
    """The cells of a matrix, unit squares grouped by opacity; the square root lifts the small shares into sight."""
    level = np.ceil(np.sqrt(np.where(shares < 0.01, 0, shares)) * levels).astype(int)
    return [
        (step / levels, "".join(f"M{j} {i}h1v1h-1z" for i, j in np.argwhere(level == step)))
        for step in range(1, levels + 1)
        if (level == step).any()
    ]


def weight_histogram(task: TaskView, bins: int = 25) -> dict[str, Any] | None:
    """The histogram of the text's weight: left, the image decides; right, the text."""
    if task.weights is None:
        return None
    weights = np.asarray(task.weights, dtype=float)
    if weights.ndim != 2 or weights.shape[1] != 2:
        raise ValueError(f"task {task.name}: weights are {list(weights.shape)}, expected [rows, 2]")
    text = weights[(weights.sum(axis=1) > 0) & np.isfinite(weights).all(axis=1), 0]
    if not len(text):
        return None
    counts, edges = np.histogram(text.clip(0, 1), bins=bins, range=(0, 1))
    low, high = np.quantile(text, [0.1, 0.9])
    return {
        "mean": float(text.mean()),
        "low": float(low),
        "high": float(high),
        "rows": len(text),
        "bars": [
            (
                count / counts.max(),
                "text" if (left + right) / 2 > 0.5 else "image",
                f"{left:.2f} to {right:.2f}: {count}",
            )
            for count, left, right in zip(counts, edges, edges[1:], strict=False)
        ],
    }


def precision_curve(task: TaskView, target: float) -> _Chart | None:
    if task.precision_curve is None or task.recall_curve is None or not len(task.precision_curve):
        return None
    precision, recall = np.asarray(task.precision_curve, dtype=float), np.asarray(task.recall_curve, dtype=float)
    if precision.shape != recall.shape or precision.ndim != 1:
        raise ValueError(f"task {task.name}: precision_curve and recall_curve must be two arrays of one length")
    reached = np.flatnonzero(precision >= target)
    mark, caption = None, f"dashed: precision {target:g}, not reached"
    if len(reached) and recall[reached].max() > 0:
        best = reached[np.argmax(recall[reached])]
        mark = (float(recall[best]), float(precision[best]))
        caption = f"dashed: precision {target:g}, kept up to recall {recall[best]:.3f}"
    shown = np.unique(np.linspace(0, len(precision) - 1, min(len(precision), _CURVE_POINTS)).astype(int))
    series = [("ink", "precision", recall[shown], precision[shown])]
    return _chart("Precision over recall", caption, "recall", series, (0.0, 1.0), (0.0, 1.0), mark, target)


def reliability_diagram(task: TaskView) -> _Chart | None:
    """Share of right answers over confidence, before and after calibration."""
    if task.reliability is None or not len(task.reliability[1].rows):
        return None
    before, after = task.reliability
    diagonal = np.array([0.0, 1.0])
    series = [
        ("rule", "calibrated perfectly", diagonal, diagonal),
        ("faint", "before", before.confidence, before.accuracy),
        ("ink", "after", after.confidence, after.accuracy),
    ]
    caption = (
        f"expected calibration error {before.error:.3f} before calibration, {after.error:.3f} after; "
        f"{after.chance:.3f} by chance on so many rows"
    )
    return _chart("Accuracy over confidence", caption, "confidence", series, (0.0, 1.0), (0.0, 1.0))
