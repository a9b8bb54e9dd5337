"""The report of a training run as one HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cmaclip_fast.errors import clipped
from cmaclip_fast.evaluation.baselines import MAJORITY, TEXT
from cmaclip_fast.pages.charts import (
    confusion_matrix_view,
    precision_curve,
    reliability_diagram,
    training_curves,
    weight_histogram,
)
from cmaclip_fast.pages.explanation import gallery_card
from cmaclip_fast.pages.page import NAME_LENGTH, TEXT_LENGTH, finite, render_template, write_html
from cmaclip_fast.pages.views import ReportView, TaskView

LISTED_CLASSES = 50
"""Of a task with more than twice as many classes the largest and the worst are listed, so many of each."""


def render_report(view: ReportView, path: str | os.PathLike[str]) -> None:
    """Writes the report of a run as one self-contained HTML file, atomically.

    Raises:
        ValueError: arrays whose shapes do not fit each other.
        InputError: `path` cannot be written.
    """
    html = render_template(
        "report.html",
        title=clipped(view.title, NAME_LENGTH),
        summary={name: clipped(value, TEXT_LENGTH) for name, value in view.summary.items()},
        target=f"{100 * view.target_precision:g} %",
        headline=_headline(view.splits),
        promises=[clipped(sentence, TEXT_LENGTH) for sentence in view.promises],
        curves=training_curves(view.history),
        tasks=[_task(task, view.target_precision) for task in view.tasks],
        galleries=[
            ("Predicted right", [gallery_card(example) for example in view.right]),
            ("Predicted wrong", [gallery_card(example) for example in view.wrong]),
        ],
    )
    write_html(html, Path(path))


def _headline(splits: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """The metrics table turned around: a block for each task, a line for each split."""
    names = list(dict.fromkeys(task for tasks in splits.values() for task in tasks))
    return [
        {
            "task": clipped(name, NAME_LENGTH),
            "lines": [
                {"split": split, "modality": _modality(split), **_metrics(tasks[name])}
                for split, tasks in splits.items()
                if name in tasks
            ],
        }
        for name in names
    ]


def _modality(split: str) -> str:
    ends = {"text alone": "text", "image alone": "image", MAJORITY: "baseline", TEXT: "baseline"}
    return next((modality for end, modality in ends.items() if split.endswith(end)), "both")


def _metrics(metrics: dict[str, float]) -> dict[str, float | None]:
    names = ("accuracy", "macro_f1", "recall_at_precision", "rows", "micro_f1", "mean_average_precision")
    return {name: finite(metrics.get(name)) for name in names}


def _task(task: TaskView, target: float) -> dict[str, Any]:
    return {
        "name": clipped(task.name, NAME_LENGTH),
        "classes": len(task.classes),
        "metrics": _metrics(task.metrics),
        "several": "mean_average_precision" in task.metrics,
        "per_class": _listed(task.per_class),
        "confusion": confusion_matrix_view(task),
        "weights": weight_histogram(task),
        "curve": precision_curve(task, target),
        "reliability": reliability_diagram(task),
        "decision": task.decision,
    }


def _listed(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All classes, or where there are many the largest and those with the lowest F1, in the order of their names."""
    chosen = list(range(len(per_class)))
    if len(per_class) > 2 * LISTED_CLASSES:
        with_rows = [i for i in chosen if per_class[i].get("rows")]
        largest = sorted(with_rows, key=lambda i: -per_class[i]["rows"])[:LISTED_CLASSES]
        worst = sorted(with_rows, key=lambda i: finite(per_class[i].get("f1")) or 0.0)[:LISTED_CLASSES]
        chosen = sorted({*largest, *worst})
    return [{**per_class[i], "class": clipped(per_class[i]["class"], NAME_LENGTH)} for i in chosen]
