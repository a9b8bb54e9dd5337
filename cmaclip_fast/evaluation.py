"""Runs a model over a table and measures it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from cmaclip_fast.data.examples import Examples, make_loader
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.metrics import TaskMetrics, headline_metrics, task_metrics
from cmaclip_fast.modes import evaluation_copy
from cmaclip_fast.taxonomy import task_probabilities
from cmaclip_fast.types import Batch, Output

VIEWS: dict[str, dict[str, bool]] = {"both": {}, "text alone": {"image": False}, "image alone": {"text": False}}
"""What the model is given of each row: both modalities, or one with the other hidden (see `Batch.keep`)."""


class Runs(Protocol):
    """What is run: a `System`, or the engine of a `Classifier`."""

    @property
    def tasks(self) -> dict[str, list[str]]: ...

    @property
    def taxonomies(self) -> Sequence[Taxonomy]: ...

    def __call__(self, batch: Batch, with_attention: bool = False) -> Output: ...


@dataclass
class Classified:
    """A model's answers for the rows of a table.

    Attributes:
        probabilities: for each task `[N, C_task]`.
        labels: for each task `[N]`, -1 where unlabelled.
        weights: for each task `[N, 2]`, text and image; None for a system without them.
        present: `[N, 2]`, what each row had.
    """

    probabilities: dict[str, Tensor]
    labels: dict[str, Tensor]
    weights: dict[str, Tensor] | None
    present: Tensor

    def select(self, rows: Tensor) -> Classified:
        """The answers for some of the rows: a mask `[N]`, or their numbers."""
        return Classified(
            {task: probabilities[rows] for task, probabilities in self.probabilities.items()},
            {task: labels[rows] for task, labels in self.labels.items()},
            None if self.weights is None else {task: weights[rows] for task, weights in self.weights.items()},
            self.present[rows],
        )

    def by_value(self, values: Sequence[str | None]) -> dict[str, Classified]:
        """The answers for the rows of each value, in the order of the values' names; `none` where there is none."""
        rows: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            rows.setdefault(value or "none", []).append(row)
        return {value: self.select(torch.tensor(rows[value])) for value in sorted(rows)}

    def loss(self) -> float:
        """The mean over tasks of the mean negative log-likelihood of their labelled rows."""
        losses = [
            F.nll_loss(self.probabilities[task].clamp_min(1e-12).log(), labels, ignore_index=-1)
            for task, labels in self.labels.items()
            if (labels >= 0).any()
        ]
        return float(torch.stack(losses).mean()) if losses else 0.0

    def headlines(self, target_precision: float = 0.9) -> dict[str, dict[str, float]]:
        """Each task's headline numbers (see `TaskMetrics.headline`)."""
        return {
            task: headline_metrics(probabilities, self.labels[task], target_precision)
            for task, probabilities in self.probabilities.items()
            if task in self.labels
        }

    def metrics(self, target_precision: float = 0.9) -> dict[str, TaskMetrics]:
        """Each task's metrics on its labelled rows."""
        return {
            task: task_metrics(probabilities, self.labels[task], target_precision)
            for task, probabilities in self.probabilities.items()
            if task in self.labels
        }


def classify(
    model: Runs,
    examples: Examples,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    view: str = "both",
    description: str | None = None,
) -> Classified:
    """Classifies all rows, in order.

    Args:
        view: a key of `VIEWS`.
        description: shown with a progress bar; None shows none.
    """
    probabilities: dict[str, list[Tensor]] = {}
    labels: dict[str, list[Tensor]] = {}
    weights: dict[str, list[Tensor]] = {}
    present: list[Tensor] = []
    for batch, output in run(model, examples, batch_size, device, view, description):
        parts = (
            (probabilities, task_probabilities(output.logits, model.tasks, model.taxonomies)),
            (labels, {task: values for task, values in batch.labels.items() if task in output.logits}),
            (weights, output.modality_weights or {}),
        )
        for kept, found in parts:
            for task, values in found.items():
                kept.setdefault(task, []).append(values.cpu())
        present.append(batch.present.cpu())
    joined = [{task: torch.cat(values) for task, values in kept.items()} for kept in (probabilities, labels, weights)]
    return Classified(joined[0], joined[1], {t: w.float() for t, w in joined[2].items()} or None, torch.cat(present))


@torch.inference_mode()
def run(
    model: Runs,
    examples: Examples,
    batch_size: int,
    device: torch.device | str,
    view: str = "both",
    description: str | None = None,
    with_attention: bool = False,
) -> Iterator[tuple[Batch, Output]]:
    """Runs the model over the rows, a batch at a time; a system in evaluation mode, without changing its own mode."""
    is_system = isinstance(model, nn.Module)
    if isinstance(model, nn.Module):
        model = evaluation_copy(model)
    loader = make_loader(examples, batch_size, shuffle=False)
    for batch in loader if description is None else track(loader, description, len(loader), transient=True):
        batch = batch.keep(**VIEWS[view])
        if is_system:  # an engine copies the batch itself
            batch = batch.to(device)
        yield batch, model(batch, with_attention) if with_attention else model(batch)
