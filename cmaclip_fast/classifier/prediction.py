"""Predictions for rows: labels, probabilities and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.errors import InputError
from cmaclip_fast.systems.taxonomy import task_probabilities
from cmaclip_fast.types import IMAGE, TEXT, Output

TOP = 5


@dataclass(frozen=True)
class Prediction:
    """The prediction for one pair and one task.

    Attributes:
        label: the most probable class.
        probability: its probability.
        top: the five most probable classes with their probabilities, best first.
        text_weight, image_weight: the modality weights; None for a system without them.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    text_weight: float | None
    image_weight: float | None


def read_output(
    output: Output, tasks: dict[str, list[str]], taxonomies: Sequence[Taxonomy] = ()
) -> list[dict[str, Prediction]]:
    """The predictions of each row of a batch, from the model's output for it."""
    rows: list[dict[str, Prediction]] = [{} for _ in next(iter(output.logits.values()))]
    for task, probabilities in task_probabilities(output.logits, tasks, taxonomies).items():
        names = tasks[task]
        best = probabilities.topk(min(TOP, len(names)))
        weights = output.modality_weights[task].tolist() if output.modality_weights is not None else [None] * len(rows)
        for row, values, classes, weight in zip(
            rows, best.values.tolist(), best.indices.tolist(), weights, strict=True
        ):
            top = tuple((names[c], p) for c, p in zip(classes, values, strict=True))
            text, image = (None, None) if weight is None else (weight[TEXT], weight[IMAGE])
            row[task] = Prediction(top[0][0], top[0][1], top, text, image)
    return rows


def output_schema(keys: pa.Schema, tasks: dict[str, list[str]]) -> pa.Schema:
    """The columns of a file of predictions: the key columns, then five for each task.

    Raises:
        InputError: columns of two tasks have the same name.
    """
    fields = list(keys)
    for task in tasks:
        fields += [
            pa.field(task, pa.string()),
            pa.field(f"{task}_probability", pa.float32()),
            pa.field(f"{task}_top", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))),
            pa.field(f"{task}_text_weight", pa.float32()),
            pa.field(f"{task}_image_weight", pa.float32()),
        ]
    names = [field.name for field in fields[len(keys) :]]
    if repeated := [task for task in tasks if names.count(task) > 1]:
        raise InputError(f"task '{repeated[0]}' has the name of another task's output column: rename it")
    return pa.schema(fields)


def flatten(row: dict[str, Prediction]) -> dict[str, Any]:
    """The predictions of one row as the values of those columns."""
    record: dict[str, Any] = {}
    for task, prediction in row.items():
        record[task] = prediction.label
        record[f"{task}_probability"] = prediction.probability
        record[f"{task}_top"] = [{"label": label, "probability": p} for label, p in prediction.top]
        record[f"{task}_text_weight"] = prediction.text_weight
        record[f"{task}_image_weight"] = prediction.image_weight
    return record
