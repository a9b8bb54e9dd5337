"""What is measured of a trained model: decisions, metrics, and the view of its report."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch
from scipy.sparse import coo_array

from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.classifier.explanation import explain
from cmaclip_fast.data.classes import labelled as has_label
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.evaluation.calibration import Reliability, calibrated_probabilities
from cmaclip_fast.evaluation.evaluate import VIEWS, Classified, classify
from cmaclip_fast.evaluation.metrics import TaskMetrics, micro_curve, multi_label_metrics, pair_curve, task_metrics
from cmaclip_fast.evaluation.promise import Promise, sentences, sentences_of_absence
from cmaclip_fast.pages.views import ReportView, TaskView
from cmaclip_fast.systems.base import System
from cmaclip_fast.training.checkpoint import Progression
from cmaclip_fast.training.config import TrainingConfig

GALLERY = 12


@dataclass
class Measured:
    """Measurements of a trained model.

    Attributes:
        decisions: the calibration and the thresholds.
        record: what `metrics.json` holds.
        answers: calibrated predictions for the test rows, without the logits of every class.
        tasks: all metrics of each task on the test rows.
        promises: of each task, on the test rows.
        reliability: of each task, on the test rows, before and after calibration.
    """

    decisions: Decisions
    record: dict[str, Any]
    answers: Classified
    tasks: dict[str, TaskMetrics]
    promises: dict[str, Promise]
    reliability: dict[str, tuple[Reliability, Reliability]]


def measure(
    model: System,
    examples: dict[str, Examples],
    config: TrainingConfig,
    target_precision: float,
    progression: Progression,
    counts: dict[str, int],
) -> Measured:
    """Calibrates and chooses thresholds on the validation rows, and measures the test rows in every view.

    Args:
        examples: the splits `validation` and `test`.
        counts: how many rows were bad or truncated, and in what way.
    """
    device = next(model.parameters()).device
    size = config.batch_size
    before = classify(model, examples["validation"], size, device, with_logits=True)
    decisions = Decisions.fit(
        model, before.logits, before.labels, target_precision, config.class_thresholds, config.calibration
    )
    validation = _metrics(before, decisions, target_precision)
    before.logits.clear()  # with thousands of classes they take much memory
    both = classify(model, examples["test"], size, device, calibrations=decisions.calibrations, with_logits=True)
    full = _metrics(both, decisions, target_precision)
    raw = calibrated_probabilities(both.logits, model.tasks, model.taxonomies, multi_label=model.multi_label)
    both.logits.clear()
    kept = decisions.promises(both)
    said = {
        task: (
            Reliability.of_scores(raw[task], both.labels[task])
            if task in model.multi_label
            else Reliability.of(*raw[task].max(1), both.labels[task]),
            both.reliability(task),
        )
        for task in both.labels
    }
    metrics = {"both": {task: m.headline() for task, m in full.items()}}
    for view in VIEWS:
        if view not in metrics:
            answers = classify(model, examples["test"], size, device, view, calibrations=decisions.calibrations)
            metrics[view] = answers.headlines(target_precision)
    record = {
        "target_precision": target_precision,
        "test": metrics,
        "validation": {task: m.headline() for task, m in validation.items()},
        "decisions": {task: promise.record() for task, promise in kept.items()},
        "not_applicable": both.not_applicable(model.applies),
        "hierarchies": decisions.hierarchies(both),
        "calibration": {
            task: {**after.record(), "before_calibration": raw.error} for task, (raw, after) in said.items()
        },
        "modality_weights": mean_weights(both),
        "history": progression.history,
        "best_epoch": progression.best_epoch,
        "seconds": progression.seconds,
        "counts": counts,
        "classes": {task: m.per_class(model.tasks[task]) for task, m in full.items()},
    }
    return Measured(decisions, record, both, full, kept, said)


def _metrics(answers: Classified, decisions: Decisions, target_precision: float) -> dict[str, TaskMetrics]:
    """Each task's metrics on its labelled rows."""
    return {
        task: (multi_label_metrics if task in answers.scores else task_metrics)(
            probabilities, answers.labels[task], target_precision
        )
        for task, probabilities in decisions.probabilities(answers.logits).items()
        if task in answers.labels
    }


def mean_weights(answers: Classified) -> dict[str, dict[str, float]] | None:
    """For each task the mean weights of text and image over the rows that have both."""
    if answers.weights is None:
        return None
    both = answers.present.all(1)
    if not both.any():
        return None
    means = {task: weights[both].mean(0).tolist() for task, weights in answers.weights.items()}
    return {task: {"text": text, "image": image} for task, (text, image) in means.items()}


def report_view(
    title: str,
    facts: dict[str, str],
    model: System,
    test: Examples,
    measured: Measured,
    target_precision: float,
) -> ReportView:
    """The report of a training run.

    Args:
        facts: shown at its top; the machine and the version of PyTorch are added.
        test: the test rows, some of which are shown.
    """
    right, wrong = gallery_rows(measured.answers)
    names = {"both": "test", "text alone": "test, text alone", "image alone": "test, image alone"}
    splits = {names[view]: tasks for view, tasks in measured.record["test"].items()}
    splits |= {f"test, {name}": tasks for name, tasks in measured.record.get("baselines", {}).items()}
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return ReportView(
        title=title,
        summary={
            **facts,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}",
            "torch": torch.__version__,
        },
        history=measured.record["history"],
        splits=splits,
        tasks=[_task_view(model, task, m, measured) for task, m in measured.tasks.items()],
        right=explain(model, test.table.select(right), measured.decisions),
        wrong=explain(model, test.table.select(wrong), measured.decisions),
        promises=[*sentences(measured.promises), *sentences_of_absence(measured.record["not_applicable"])],
        target_precision=target_precision,
    )


def _task_view(model: System, task: str, metrics: TaskMetrics, measured: Measured) -> TaskView:
    answers = measured.answers
    if task in answers.scores:
        precision, recall = pair_curve(answers.scores[task], answers.labels[task])
    else:
        precision, recall = micro_curve(answers.confidence[task], answers.predicted[task], answers.labels[task])
    counts = metrics.confusion
    return TaskView(
        name=task,
        classes=model.tasks[task],
        metrics=metrics.headline(),
        per_class=metrics.per_class(model.tasks[task]),
        confusion=None
        if counts is None
        else coo_array((counts.values().numpy(), counts.indices().numpy()), shape=counts.shape),
        weights=None if answers.weights is None else answers.weights[task].numpy(),
        precision_curve=precision.numpy(),
        recall_curve=recall.numpy(),
        decision=measured.promises[task].record() if task in measured.promises else None,
        reliability=measured.reliability.get(task),
    )


def gallery_rows(answers: Classified, number: int = GALLERY) -> tuple[list[int], list[int]]:
    """Rows to show: right in every task, and wrong in at least one, each the surest half and a spread of the rest."""
    surest = torch.stack(list(answers.confidence.values())).mean(0)
    wrong = torch.zeros(len(surest), dtype=torch.bool)
    labelled = torch.zeros(len(surest), dtype=torch.bool)
    for task, predicted in answers.predicted.items():
        labels = answers.labels[task]
        known = has_label(labels)
        labelled |= known
        if task in answers.scores:
            wrong |= known & ((answers.scores[task] >= 0.5) != (labels == 1)).any(1)
        else:
            wrong |= known & (predicted != labels)

    def pick(mask: torch.Tensor) -> list[int]:
        rows = mask.nonzero().flatten()
        ordered = rows[surest[rows].argsort(descending=True)]
        head, rest = ordered[: number // 2], ordered[number // 2 :]
        step = max(1, len(rest) // max(1, number - len(head)))
        return torch.cat([head, rest[::step][: number - len(head)]]).tolist()

    return pick(labelled & ~wrong), pick(wrong)
