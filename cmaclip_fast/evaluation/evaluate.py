"""Runs a model over a table and measures it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from rich.progress import track
from torch import Tensor, nn

from cmaclip_fast.data.classes import labelled
from cmaclip_fast.data.examples import Examples, make_loader
from cmaclip_fast.data.named import Taxonomy, applies_task
from cmaclip_fast.evaluation.calibration import Calibrations, Reliability, calibrated_probabilities
from cmaclip_fast.evaluation.metrics import headline_metrics, multi_label_metrics
from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.types import Batch, Output

VIEWS: dict[str, dict[str, bool]] = {"both": {}, "text alone": {"image": False}, "image alone": {"text": False}}
"""What the model is given of each row: both modalities, or one with the other hidden (see `Batch.keep`)."""


class Runs(Protocol):
    """What is run: a `System`, or the engine of a `Classifier`."""

    @property
    def tasks(self) -> dict[str, list[str]]: ...

    @property
    def taxonomies(self) -> Sequence[Taxonomy]: ...

    @property
    def multi_label(self) -> Collection[str]: ...

    def __call__(self, batch: Batch, with_attention: bool = False) -> Output: ...


@dataclass
class Classified:
    """A model's answers for the rows of a table.

    Attributes:
        predicted, confidence: for each task `[N]`, the most probable class and its probability.
        labels: for each task `[N]`, -1 where unlabelled; of a multi-label task `[N, C_task]` (see `encode`).
        likelihood: for each labelled task `[N]`, the probability of the label, of several classes the geometric mean
            over the classes of the task; undefined where unlabelled.
        weights: for each task `[N, 2]`, text and image; None for a system without them.
        present: `[N, 2]`, what each row had.
        logits: for each task `[N, C_task]`, float32, before calibration; empty unless asked for, since many classes
            take gigabytes.
        scores: for each multi-label task `[N, C_task]`, the probability of every class.
    """

    predicted: dict[str, Tensor]
    confidence: dict[str, Tensor]
    labels: dict[str, Tensor]
    likelihood: dict[str, Tensor]
    weights: dict[str, Tensor] | None
    present: Tensor
    logits: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def select(self, rows: Tensor) -> Classified:
        """The answers for some of the rows: a mask `[N]`, or their numbers."""

        def chosen(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {task: of_task[rows] for task, of_task in values.items()}

        return Classified(
            chosen(self.predicted),
            chosen(self.confidence),
            chosen(self.labels),
            chosen(self.likelihood),
            None if self.weights is None else chosen(self.weights),
            self.present[rows],
            chosen(self.logits),
            chosen(self.scores),
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
            -self.likelihood[task][known].clamp_min(1e-12).log().mean()
            for task, labels in self.labels.items()
            if (known := labelled(labels)).any()
        ]
        return float(torch.stack(losses).mean()) if losses else 0.0

    def reliabilities(self) -> dict[str, Reliability]:
        """The reliability diagram of each labelled task."""
        return {task: self.reliability(task) for task in self.labels}

    def reliability(self, task: str) -> Reliability:
        """Of a labelled task; of a multi-label task that of every class of every row."""
        if task in self.scores:
            return Reliability.of_scores(self.scores[task], self.labels[task])
        return Reliability.of(self.confidence[task], self.predicted[task], self.labels[task])

    def not_applicable(self, applies: Iterable[str]) -> dict[str, dict[str, float]]:
        """How well it is found that a task does not apply: `precision`, `recall`, and `rows` that it does not apply to.

        Precision and recall are NaN where no such row is predicted, or there is none.

        Args:
            applies: the tasks that may not.
        """
        found = {}
        for task in applies:
            labels, predicted = self.labels.get(applies_task(task)), self.predicted[applies_task(task)]
            if labels is None:
                continue
            known = labels >= 0
            said, true = known & (predicted == 0), labels == 0
            hits, rows = int((said & true).sum()), int(true.sum())
            found[task] = {
                "precision": hits / int(said.sum()) if said.any() else math.nan,
                "recall": hits / rows if rows else math.nan,
                "rows": rows,
            }
        return found

    def headlines(self, target_precision: float = 0.9) -> dict[str, dict[str, float]]:
        """Each task's headline numbers (see `TaskMetrics.headline`)."""
        return {
            task: multi_label_metrics(self.scores[task], self.labels[task], target_precision).headline()
            if task in self.scores
            else headline_metrics(self.confidence[task], predicted, self.labels[task], target_precision)
            for task, predicted in self.predicted.items()
            if task in self.labels
        }


def classify(
    model: Runs,
    examples: Examples,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    view: str = "both",
    description: str | None = None,
    calibrations: Calibrations | None = None,
    with_logits: bool = False,
) -> Classified:
    """Classifies all rows, in order.

    Args:
        view: a key of `VIEWS`.
        description: shown with a progress bar; None shows none.
        calibrations: of the model; None gives its own probabilities.
        with_logits: keep those of every class.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {
        name: {} for name in ("predicted", "confidence", "labels", "likelihood", "weights", "scores")
    }
    logits: dict[str, Tensor] = {}
    present: list[Tensor] = []
    done = 0
    for batch, output in run(model, examples, batch_size, device, view, description):
        found = calibrated_probabilities(output.logits, model.tasks, model.taxonomies, calibrations, model.multi_label)
        best = {task: values.max(1) for task, values in found.items()}
        labels = {task: values for task, values in batch.labels.items() if task in found}
        likelihood = {task: _likelihood(found[task], values) for task, values in labels.items()}
        for name, of_batch in {
            "predicted": {task: values.indices for task, values in best.items()},
            "confidence": {task: values.values for task, values in best.items()},
            "labels": labels,
            "likelihood": likelihood,
            "weights": output.modality_weights or {},
            "scores": {task: values for task, values in found.items() if task in model.multi_label},
        }.items():
            for task, values in of_batch.items():
                parts[name].setdefault(task, []).append(values.cpu())
        if with_logits:
            for task, values in output.logits.items():
                if task not in logits:
                    logits[task] = torch.empty(len(examples), values.shape[1])
                logits[task][done : done + len(batch)] = values
        present.append(batch.present.cpu())
        done += len(batch)
    joined = {name: {task: torch.cat(values) for task, values in of.items()} for name, of in parts.items()}
    weights = {task: values.float() for task, values in joined.pop("weights").items()} or None
    return Classified(**joined, weights=weights, present=torch.cat(present), logits=logits)


def _likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return torch.where(labels == 1, probabilities, 1 - probabilities).clamp_min(1e-12).log().mean(1).exp()
    return probabilities.gather(1, labels.clamp_min(0)[:, None])[:, 0]


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
