"""The HTML pages: the report of a training run and the explanation of single rows.

Takes plain data and knows no model. Every page is one file that fetches nothing: styles and the sorting script are
inline, pictures are data URIs, charts are SVG or boxes in the reader's own light or dark colours.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.sparse import coo_array

from cmaclip_fast.errors import clipped, visible
from cmaclip_fast.files import replacing

LABELLED_CLASSES = 20
"""A confusion matrix of more classes than this is drawn without labels, beside the most confused pairs."""

DRAWN_CLASSES = 200
"""A confusion matrix has at most so many classes, those with the most rows."""

LISTED_CLASSES = 50
"""Of a task with more than twice as many classes the largest and the worst are listed, so many of each."""

_TEXT, _NAME = 2000, 120
"""The most characters of a text and of a class name or key that a page shows."""

_GALLERY_SIDE, _STAGE_SIDE, _MAP_SIDE = 256, 640, 128
_CURVE_POINTS = 240
_TEMPLATES = Path(__file__).parent / "templates"
_SPECIAL = re.compile(r"<\|?/?[A-Za-z_]+\|?>|\[[A-Z]+\]")


@dataclass
class Prediction:
    """What was said of one row for one task.

    Attributes:
        label: the true class, or None where the row is unlabelled.
        predicted: the most probable class.
        probability: its probability, 0 to 1.
        top: the most probable classes with their probabilities, best first.
        weights: the modality weights of text and image (in this order), or None for a system without them.
    """

    label: str | None
    predicted: str
    probability: float
    top: list[tuple[str, float]] = field(default_factory=list)
    weights: tuple[float, float] | None = None


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
        metrics: `accuracy`, `macro_f1`, `recall_at_precision`, `rows`; what is missing or not finite shows as a dash.
        per_class: for each class `class`, `rows`, `precision`, `recall`, `f1`, `recall_at_precision`.
        confusion: `[C, C]` counts, dense or sparse, a row for each true class.
        weights: `[N, 2]` modality weights (text, image); rows that sum to 0 (neither present) are left out.
        precision_curve, recall_curve: two arrays of one length, a point for each confidence threshold.
    """

    name: str
    classes: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    per_class: list[dict[str, Any]] = field(default_factory=list)
    confusion: np.ndarray | coo_array | None = None
    weights: np.ndarray | None = None
    precision_curve: np.ndarray | None = None
    recall_curve: np.ndarray | None = None


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
    """

    title: str
    summary: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    splits: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    tasks: list[TaskView] = field(default_factory=list)
    right: list[ExampleView] = field(default_factory=list)
    wrong: list[ExampleView] = field(default_factory=list)
    target_precision: float = 0.9


def render_report(view: ReportView, path: str | os.PathLike[str]) -> None:
    """Writes the report of a run as one self-contained HTML file, atomically.

    Raises:
        ValueError: arrays whose shapes do not fit each other.
        InputError: `path` cannot be written.
    """
    html = _render(
        "report.html",
        title=clipped(view.title, _NAME),
        summary={name: clipped(value, _TEXT) for name, value in view.summary.items()},
        target=f"{100 * view.target_precision:g} %",
        headline=_headline(view.splits),
        curves=_curves(view.history),
        tasks=[_task(task, view.target_precision) for task in view.tasks],
        galleries=[
            ("Predicted right", [_card(example) for example in view.right]),
            ("Predicted wrong", [_card(example) for example in view.wrong]),
        ],
    )
    _write(html, Path(path))


def render_explanation(
    examples: list[ExampleView], path: str | os.PathLike[str], title: str, summary: dict[str, str]
) -> None:
    """Writes the predictions and attention maps of single rows as one self-contained HTML file, atomically.

    Raises:
        ValueError: arrays whose shapes do not fit each other.
        InputError: `path` cannot be written.
    """
    rows = [_explained(example) for example in examples]
    layers = max((len(row["layers"]) for row in rows), default=0)
    _write(_render("explain.html", title=title, summary=summary, rows=rows, layers=layers), Path(path))


def relevant_token(example: ExampleView) -> int | None:
    """The text token with the largest total attention to patches, special tokens left out (paper, figure 2)."""
    if example.token_to_patch is None:
        return None
    totals = _token_maps(example).sum(axis=(1, 2))
    plain = [i for i, token in enumerate(example.tokens) if not is_special(token)]
    return max(plain, key=lambda i: float(totals[i]), default=None)


def is_special(token: str) -> bool:
    """Whether a token is a mark of the tokenizer (`<start_of_text>`, `<|endoftext|>`, `[CLS]`, `</s>`), not a word."""
    return _SPECIAL.fullmatch(token.strip()) is not None and token.strip() != "</w>"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=_share, count=_count, percent=_percent, soft=_soft)
    return environment


def _shown(value: Any) -> Any:
    """What a template writes, without characters that a reader's browser or editor would obey."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def _render(template: str, **values: Any) -> str:
    script = (_TEMPLATES / "_sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(template).render(script=script, script_digest=digest, **values)


def _write(html: str, path: Path) -> None:
    with replacing(path) as temporary:
        # A lone surrogate in a user's text must not cost the page.
        temporary.write_bytes(html.encode("utf-8", errors="replace"))


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _share(value: Any) -> str:
    number = _finite(value)
    return "\N{EN DASH}" if number is None else f"{number:.3f}"


def _count(value: Any) -> str:
    number = _finite(value)
    return "\N{EN DASH}" if number is None else f"{number:,.0f}"


def _percent(value: Any) -> str:
    """A length for a style attribute, held within 0 and 100 %."""
    return f"{100 * min(max(_finite(value) or 0.0, 0.0), 1.0):.2f}%"


def _soft(name: str | None) -> Markup:
    """A class name that may be broken after a slash or an underscore."""
    return Markup(re.sub(r"(?<=[/_])(?=[^/_])", "<wbr>", str(escape(name or ""))))


def _word(token: str) -> str:
    """A token as a reader would write it: without the byte-pair mark for the end of a word."""
    return token.strip().removesuffix("</w>") or "␣"


def _headline(splits: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """The metrics table turned around: a block for each task, a line for each split."""
    names = list(dict.fromkeys(task for tasks in splits.values() for task in tasks))
    return [
        {
            "task": clipped(name, _NAME),
            "lines": [
                {"split": split, "modality": _modality(split), **_metrics(tasks[name])}
                for split, tasks in splits.items()
                if name in tasks
            ],
        }
        for name in names
    ]


def _modality(split: str) -> str:
    return "text" if split.endswith("text alone") else "image" if split.endswith("image alone") else "both"


def _metrics(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: _finite(metrics.get(name)) for name in ("accuracy", "macro_f1", "recall_at_precision", "rows")}


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


def _curves(history: list[dict[str, float]]) -> list[_Chart]:
    """Loss, accuracy of each task on one common scale, and learning rate, over epochs."""
    if not history:
        return []
    numbers = [_finite(entry.get("epoch")) for entry in history]
    epochs = np.array([i + 1 if number is None else number for i, number in enumerate(numbers)], dtype=float)
    columns = {
        name: np.array([math.nan if (value := _finite(entry.get(name))) is None else value for entry in history])
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
        charts.append(over_epochs(f"Accuracy, {clipped(task, _NAME)}", "highest", [("ink", task, ys)], (0.0, top)))
    if "learning_rate" in columns:
        charts.append(over_epochs("Learning rate", "", [("ink", "learning rate", columns["learning_rate"])]))
    return charts


def _task(task: TaskView, target: float) -> dict[str, Any]:
    return {
        "name": clipped(task.name, _NAME),
        "classes": len(task.classes),
        "metrics": _metrics(task.metrics),
        "per_class": _listed(task.per_class),
        "confusion": _confusion(task),
        "weights": _weights(task),
        "curve": _precision_curve(task, target),
    }


def _listed(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All classes, or where there are many the largest and those with the lowest F1, in the order of their names."""
    chosen = list(range(len(per_class)))
    if len(per_class) > 2 * LISTED_CLASSES:
        with_rows = [i for i in chosen if per_class[i].get("rows")]
        largest = sorted(with_rows, key=lambda i: -per_class[i]["rows"])[:LISTED_CLASSES]
        worst = sorted(with_rows, key=lambda i: _finite(per_class[i].get("f1")) or 0.0)[:LISTED_CLASSES]
        chosen = sorted({*largest, *worst})
    return [{**per_class[i], "class": clipped(per_class[i]["class"], _NAME)} for i in chosen]


def _confusion(task: TaskView) -> dict[str, Any] | None:
    if task.confusion is None:
        return None
    counts, classes = coo_array(task.confusion), [clipped(name, _NAME) for name in task.classes]
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


def _weights(task: TaskView, bins: int = 25) -> dict[str, Any] | None:
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


def _precision_curve(task: TaskView, target: float) -> _Chart | None:
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


def _token_maps(example: ExampleView) -> np.ndarray:
    maps = np.asarray(example.token_to_patch, dtype=float)
    if maps.ndim != 3 or len(maps) != len(example.tokens):
        raise ValueError(
            f"row {example.row}: token_to_patch is {list(maps.shape)}, expected [{len(example.tokens)}, gh, gw]"
        )
    return np.nan_to_num(maps, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)


def _card(example: ExampleView) -> dict[str, Any]:
    card = _example(example, _GALLERY_SIDE)
    chosen = relevant_token(example)
    if chosen is not None and example.image is not None:
        card["map"] = _layer(_token_maps(example)[chosen], example.image)
        card["token"] = _word(example.tokens[chosen])
    return card


def _example(example: ExampleView, side: int) -> dict[str, Any]:
    return {
        "row": example.row,
        "key": clipped(example.key, _NAME),
        "text": None if example.text is None else clipped(example.text, _TEXT),
        "picture": None if example.image is None else _picture(example.image, side),
        "aspect": 1.0 if example.image is None else example.image.width / example.image.height,
        "map": None,
        "token": None,
        "predictions": [
            {
                "task": clipped(task, _NAME),
                "label": None if said.label is None else clipped(said.label, _NAME),
                "predicted": clipped(said.predicted, _NAME),
                "probability": said.probability,
                "right": None if said.label is None else said.label == said.predicted,
                "top": [(clipped(name, _NAME), probability) for name, probability in said.top[:5]],
                "weights": said.weights,
            }
            for task, said in example.predictions.items()
        ],
    }


def _explained(example: ExampleView) -> dict[str, Any]:
    """An example with a layer for each map to lay over the picture: the image's global token, then the text tokens."""
    row = _example(example, _STAGE_SIDE)
    reading = None
    if example.text_global_to_token is not None:
        reading = np.asarray(example.text_global_to_token, dtype=float)
        if reading.shape != (len(example.tokens),):
            raise ValueError(
                f"row {example.row}: text_global_to_token is {list(reading.shape)}, expected [{len(example.tokens)}]"
            )
    maps = None if example.token_to_patch is None else _token_maps(example)
    layers: list[str] = []

    def add(weights: np.ndarray | None) -> int | None:
        if weights is None or example.image is None:
            return None
        layers.append(_layer(weights, example.image))
        return len(layers) - 1

    row["image_token"] = add(
        None if example.image_global_to_patch is None else np.asarray(example.image_global_to_patch)
    )
    chosen, top = relevant_token(example), 0.0 if reading is None else _finite(reading.max(initial=0)) or 0.0
    row["tokens"] = [
        {
            "word": _word(token),
            "special": is_special(token),
            "layer": add(None if maps is None else maps[i]),
            "relevant": i == chosen,
            "to_patches": None if maps is None else float(maps[i].sum()),
            "read": None if reading is None else float(reading[i]),
            "bar": 0.0 if reading is None or not top else float(reading[i]) / top,
        }
        for i, token in enumerate(example.tokens)
    ]
    row["layers"] = layers
    row["reading"] = reading is not None
    return row


def _flat(image: Image.Image) -> Image.Image:
    """The picture as RGB; what is transparent becomes white, the paper it will be seen on."""
    picture = image.convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture).convert("RGB")


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _picture(image: Image.Image, side: int) -> str:
    if max(image.size) > side:
        image = _flat(image).resize(_fit(image.size, side), Image.Resampling.LANCZOS)
    return _data_uri(_flat(image), quality=85)


def _layer(weights: np.ndarray, image: Image.Image) -> str:
    """A map `[gh, gw]` as a veil to lay over the picture: from 0 to the map's own maximum, bilinear between patches.

    The veil thins where attention is high, so that the attended part of the picture is seen best.
    """
    if weights.ndim != 2:
        raise ValueError(f"an attention map is {list(weights.shape)}, expected [gh, gw]")
    weights = np.nan_to_num(weights.astype(float), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    scaled = (weights / (weights.max(initial=0) or 1.0)).astype(np.float32)
    smooth = Image.fromarray(scaled).resize(_fit(image.size, _MAP_SIDE), Image.Resampling.BILINEAR)
    values = np.asarray(smooth).clip(0, 1)
    veil = colormaps["viridis"](values)
    veil[..., 3] = 0.74 - 0.3 * values
    return _data_uri(Image.fromarray((255 * veil).round().astype(np.uint8)), quality=80)


def _data_uri(image: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
