"""Predictions for rows: labels, statuses, probabilities and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.errors import InputError
from cmaclip_fast.systems.taxonomy import task_probabilities
from cmaclip_fast.types import IMAGE, TEXT, Output

TOP = 5


Status = Literal["accepted", "unsure"]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one pair and one task.

    Attributes:
        label: the most probable class; None where the answer is not accepted.
        status: `accepted`, or `unsure`: a person should look. None for a model without thresholds, whose label is
            always given.
        probability: of the most probable class.
        top: the five most probable classes with their probabilities, best first.
        text_weight, image_weight: the modality weights; None for a system without them.
    """

    label: str | None
    status: Status | None
    probability: float
    top: tuple[tuple[str, float], ...]
    text_weight: float | None
    image_weight: float | None


def read_output(
    output: Output,
    tasks: dict[str, list[str]],
    taxonomies: Sequence[Taxonomy] = (),
    decisions: Decisions | None = None,
    calibrated: bool = True,
) -> list[dict[str, Prediction]]:
    """The predictions of each row of a batch, from the model's output for it.

    Args:
        decisions: the model's; None takes its own probabilities and decides nothing.
        calibrated: give calibrated probabilities. Labels and statuses are the same without.
    """
    rows: list[dict[str, Prediction]] = [{} for _ in next(iter(output.logits.values()))]
    found = (
        task_probabilities(output.logits, tasks, taxonomies)
        if decisions is None
        else decisions.probabilities(output.logits)
    )
    best = {task: values.topk(min(TOP, values.shape[1])) for task, values in found.items()}
    statuses: dict[str, list[Status | None]] = {task: [None] * len(rows) for task in tasks}
    if decisions is not None:
        first = {task: (top.values[:, 0], top.indices[:, 0]) for task, top in best.items()}
        accepted = decisions.accepted(
            {task: confidence for task, (confidence, _) in first.items()},
            {task: predicted for task, (_, predicted) in first.items()},
        )
        for task, mask in accepted.items():
            statuses[task] = ["accepted" if taken else "unsure" for taken in mask.tolist()]
        if not calibrated:
            found = task_probabilities(output.logits, tasks, taxonomies)
    for task, top in best.items():
        names = tasks[task]
        probabilities = found[task].gather(1, top.indices)
        weights = output.modality_weights[task].tolist() if output.modality_weights is not None else [None] * len(rows)
        for row, values, classes, weight, status in zip(
            rows, probabilities.tolist(), top.indices.tolist(), weights, statuses[task], strict=True
        ):
            five = tuple((names[c], p) for c, p in zip(classes, values, strict=True))
            text, image = (None, None) if weight is None else (weight[TEXT], weight[IMAGE])
            label = None if status == "unsure" else five[0][0]
            row[task] = Prediction(label, status, five[0][1], five, text, image)
    return rows


def deepest(row: dict[str, Prediction], taxonomy: Taxonomy) -> str | None:
    """The path down to the lowest level of a taxonomy that is accepted; None where the first is not."""
    accepted = [row[task].label for task in taxonomy.levels_in(row)]
    return next((label for label in reversed(accepted) if label is not None), None)


def output_schema(keys: pa.Schema, tasks: dict[str, list[str]], taxonomies: Sequence[Taxonomy] = ()) -> pa.Schema:
    """The columns of a file of predictions: the key columns, six for each task, and one for each taxonomy.

    Raises:
        InputError: two columns have the same name.
    """
    fields = list(keys)
    for task in tasks:
        fields += [
            pa.field(task, pa.string()),
            pa.field(f"{task}_status", pa.string()),
            pa.field(f"{task}_probability", pa.float32()),
            pa.field(f"{task}_top", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))),
            pa.field(f"{task}_text_weight", pa.float32()),
            pa.field(f"{task}_image_weight", pa.float32()),
        ]
    fields += [pa.field(taxonomy.column, pa.string()) for taxonomy in taxonomies]
    names = [field.name for field in fields[len(keys) :]]
    if repeated := [name for name in (*tasks, *(t.column for t in taxonomies)) if names.count(name) > 1]:
        raise InputError(f"task '{repeated[0]}' has the name of another task's output column: rename it")
    return pa.schema(fields)


def flatten(row: dict[str, Prediction], taxonomies: Sequence[Taxonomy] = ()) -> dict[str, Any]:
    """The predictions of one row as the values of those columns."""
    record: dict[str, Any] = {}
    for task, prediction in row.items():
        record[task] = prediction.label
        record[f"{task}_status"] = prediction.status
        record[f"{task}_probability"] = prediction.probability
        record[f"{task}_top"] = [{"label": label, "probability": p} for label, p in prediction.top]
        record[f"{task}_text_weight"] = prediction.text_weight
        record[f"{task}_image_weight"] = prediction.image_weight
    for taxonomy in taxonomies:
        record[taxonomy.column] = deepest(row, taxonomy)
    return record
