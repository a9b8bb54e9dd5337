"""Predictions for rows: labels, statuses, probabilities and weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.errors import InputError
from cmaclip_fast.systems.taxonomy import task_probabilities
from cmaclip_fast.types import IMAGE, TEXT, Output

TOP = 5


Status = Literal["accepted", "unsure", "not_applicable"]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one pair and one task.

    Attributes:
        label: the most probable class; of a multi-label task the accepted classes, best first. None where the answer is
            not accepted.
        status: `accepted`, `unsure`: a person should look, or `not_applicable`: it is accepted that the task does not
            apply. None for a model without thresholds, whose label is always given. A multi-label task is accepted
            where any of its classes is.
        probability: of the most probable class.
        top: the five most probable classes with their probabilities, best first.
        text_weight, image_weight: the modality weights; None for a system without them.
        likely: of a multi-label task all classes of a probability of 0.5 or more, best first; None for other tasks.
    """

    label: str | tuple[str, ...] | None
    status: Status | None
    probability: float
    top: tuple[tuple[str, float], ...]
    text_weight: float | None
    image_weight: float | None
    likely: tuple[str, ...] | None = None


def read_output(
    output: Output,
    tasks: dict[str, list[str]],
    taxonomies: Sequence[Taxonomy] = (),
    decisions: Decisions | None = None,
    calibrated: bool = True,
    multi_label: Collection[str] = (),
) -> list[dict[str, Prediction]]:
    """The predictions of each row of a batch, from the model's output for it.

    Args:
        decisions: the model's; None takes its own probabilities and decides nothing.
        calibrated: give calibrated probabilities. Labels and statuses are the same without.
        multi_label: the tasks whose rows have any number of classes; those of `decisions` where there are any.
    """
    if decisions is not None:
        multi_label = decisions.multi_label
    rows: list[dict[str, Prediction]] = [{} for _ in next(iter(output.logits.values()))]
    given = found = (
        task_probabilities(output.logits, tasks, taxonomies, multi_label)
        if decisions is None
        else decisions.probabilities(output.logits)
    )
    if not calibrated:
        given = task_probabilities(output.logits, tasks, taxonomies, multi_label)
    best = {task: values.topk(min(TOP, values.shape[1])) for task, values in found.items()}
    chosen = {task: found[task] >= 0.5 for task in found if task in multi_label}
    likely = {task: _names(mask, found[task], tasks[task]) for task, mask in chosen.items()}
    labels: dict[str, list[tuple[str, ...]]] = likely
    statuses: dict[str, list[Status | None]] = {task: [None] * len(rows) for task in tasks}
    if decisions is not None:
        confidence = {task: top.values[:, 0] for task, top in best.items()}
        predicted = {task: top.indices[:, 0] for task, top in best.items()}
        accepted = decisions.accepted(confidence, predicted, {task: found[task] for task in chosen})
        labels = {task: _names(accepted[task], found[task], tasks[task]) for task in chosen}
        absent = decisions.inapplicable(accepted, predicted)
        for task, mask in accepted.items():
            taken = mask.any(1) if task in chosen else mask
            none = absent.get(task, torch.zeros_like(taken))
            statuses[task] = [
                "not_applicable" if away else "accepted" if take else "unsure"
                for take, away in zip(taken.tolist(), none.tolist(), strict=True)
            ]
    for task, top in best.items():
        names = tasks[task]
        probabilities = given[task].gather(1, top.indices)
        weights = output.modality_weights[task].tolist() if output.modality_weights is not None else [None] * len(rows)
        for number, (row, values, classes, weight, status) in enumerate(
            zip(rows, probabilities.tolist(), top.indices.tolist(), weights, statuses[task], strict=True)
        ):
            five = tuple((names[c], p) for c, p in zip(classes, values, strict=True))
            text, image = (None, None) if weight is None else (weight[TEXT], weight[IMAGE])
            answer = labels[task][number] if task in chosen else five[0][0]
            row[task] = Prediction(
                answer if status in (None, "accepted") else None,
                status,
                five[0][1],
                five,
                text,
                image,
                likely[task][number] if task in chosen else None,
            )
    return rows


def _names(chosen: Tensor, scores: Tensor, names: Sequence[str]) -> list[tuple[str, ...]]:
    """For each row the names of the chosen classes `[B, C]`, in the order of their scores."""
    found: list[list[str]] = [[] for _ in range(len(chosen))]
    ranked, order = scores.where(chosen, -1).sort(dim=1, descending=True, stable=True)
    rows, ranks = (ranked >= 0).nonzero().unbind(1)
    for row, number in zip(rows.tolist(), order[rows, ranks].tolist(), strict=True):
        found[row].append(names[number])
    return [tuple(of_row) for of_row in found]


def deepest(row: dict[str, Prediction], taxonomy: Taxonomy) -> str | None:
    """The path down to the lowest level of a taxonomy that is accepted; None where the first is not."""
    accepted = [row[task].label for task in taxonomy.levels_in(row)]
    return next((label for label in reversed(accepted) if isinstance(label, str)), None)


def output_schema(
    keys: pa.Schema,
    tasks: dict[str, list[str]],
    taxonomies: Sequence[Taxonomy] = (),
    multi_label: Collection[str] = (),
) -> pa.Schema:
    """The columns of a file of predictions: the key columns, six for each task, and one for each taxonomy.

    The label of a multi-label task is a list.

    Raises:
        InputError: two columns have the same name.
    """
    fields = list(keys)
    for task in tasks:
        fields += [
            pa.field(task, pa.list_(pa.string()) if task in multi_label else pa.string()),
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
        record[task] = list(prediction.label) if isinstance(prediction.label, tuple) else prediction.label
        record[f"{task}_status"] = prediction.status
        record[f"{task}_probability"] = prediction.probability
        record[f"{task}_top"] = [{"label": label, "probability": p} for label, p in prediction.top]
        record[f"{task}_text_weight"] = prediction.text_weight
        record[f"{task}_image_weight"] = prediction.image_weight
    for taxonomy in taxonomies:
        record[taxonomy.column] = deepest(row, taxonomy)
    return record
