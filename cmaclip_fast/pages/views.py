"""The plain data that pages show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from scipy.sparse import coo_array

from cmaclip_fast.evaluation.calibration import Reliability


@dataclass
class Prediction:
    """What was said of one row for one task.

    Attributes:
        label: the true class, or None where the row is unlabelled; of a multi-label task the classes with commas.
        predicted: the most probable class; of a multi-label task the classes of a probability of 0.5 or more.
        status: `accepted`, `unsure` or `not_applicable`; None where the model has no thresholds.
        probability: its probability, 0 to 1.
        top: the most probable classes with their probabilities, best first.
        weights: the modality weights of text and image (in this order), or None for a system without them.
    """

    label: str | None
    predicted: str
    probability: float
    top: list[tuple[str, float]] = field(default_factory=list)
    weights: tuple[float, float] | None = None
    status: str | None = None


@dataclass
class ExampleView:
    """One row of the table with its predictions and, where there are any, its attention maps.

    Attributes:
        row: the row's number in its table.
        key: what names the row for a reader (an id, a path), may be empty.
        image: the part of the picture that the patches cover, or None where absent.
        text: the text, or None where absent.
        tokens: the n text tokens as strings, special ones included.
        token_to_patch: `[n, gh, gw]`, attention of each text token to each patch.
        image_global_to_patch: `[gh, gw]`, attention of the image's global token to each patch.
        text_global_to_token: `[n]`, attention of the text's global token to each text token.
        predictions: the prediction of each task.
    """

    row: int
    key: str
    image: Image.Image | None
    text: str | None
    tokens: list[str] = field(default_factory=list)
    token_to_patch: np.ndarray | None = None
    image_global_to_patch: np.ndarray | None = None
    text_global_to_token: np.ndarray | None = None
    predictions: dict[str, Prediction] = field(default_factory=dict)


@dataclass
class TaskView:
    """One task as measured on the split that the report is about.

    Attributes:
        name: the task.
        classes: its C class names.
        metrics: `accuracy`, `macro_f1`, `recall_at_precision`, `rows`, and of a multi-label task `micro_f1` and
            `mean_average_precision`; what is missing or not finite shows as a dash.
        per_class: for each class `class`, `rows`, `precision`, `recall`, `f1`, `recall_at_precision`.
        confusion: `[C, C]` counts, dense or sparse, a row for each true class; None for a multi-label task.
        weights: `[N, 2]` modality weights (text, image); rows that sum to 0 (neither present) are left out.
        precision_curve, recall_curve: two arrays of one length, a point for each confidence threshold.
        decision: `target_precision`, `rows`, `accepted`, `coverage`, `precision`, `verdict` of the accepted rows.
        reliability: before and after calibration.
    """

    name: str
    classes: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    per_class: list[dict[str, Any]] = field(default_factory=list)
    confusion: np.ndarray | coo_array | None = None
    weights: np.ndarray | None = None
    precision_curve: np.ndarray | None = None
    recall_curve: np.ndarray | None = None
    decision: dict[str, Any] | None = None
    reliability: tuple[Reliability, Reliability] | None = None


@dataclass
class ReportView:
    """All that a report shows.

    Attributes:
        title: the heading.
        summary: what was run and on what, in the order to show it (model, parameters, data, seed, time, versions).
        history: one dict an epoch: `epoch`, `train_loss`, `validation_loss`, `learning_rate`, `accuracy/<task>`;
            what is missing or not finite leaves a gap in its curve.
        splits: for each split (`test`, `test, text alone`, `test, image alone`) the metrics of each task.
        tasks: a section for each.
        right, wrong: rows for the gallery, some 24 together to keep the file small.
        target_precision: the precision, 0 to 1, at which recall is reported.
        promises: for each task a sentence: how many rows can be published, how many need a person.
    """

    title: str
    summary: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    splits: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    tasks: list[TaskView] = field(default_factory=list)
    right: list[ExampleView] = field(default_factory=list)
    wrong: list[ExampleView] = field(default_factory=list)
    target_precision: float = 0.9
    promises: list[str] = field(default_factory=list)


@dataclass
class RowView:
    """One row of a table.

    Attributes:
        row: its number in its file.
        keys: the values of its key columns.
        text, image: None where absent.
    """

    row: int
    keys: list[str]
    text: str | None
    image: Image.Image | None


@dataclass
class AuditRow:
    """One finding of an audit; see `Finding`.

    Attributes:
        rank: its place among those of its kind and task, from 1.
        related: the row that `row` was compared with, or None.
    """

    kind: str
    task: str | None
    rank: int
    row: RowView
    score: float
    given: str | None = None
    suggested: str | None = None
    likely: bool | None = None
    related: RowView | None = None
    note: str = ""
