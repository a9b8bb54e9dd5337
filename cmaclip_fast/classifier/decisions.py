"""Decisions: which answers of a model are accepted without a look, and which a person must check.

Probabilities are calibrated on the validation rows, and a task's answer is accepted from the confidence on at which
its precision is shown to reach the target (`evaluation/thresholds.py`). The validation answers are kept with the model,
so that thresholds for another precision are chosen without training again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel
from safetensors.torch import load_file
from torch import Tensor

from cmaclip_fast.classifier.artifact import CALIBRATION, MAX_CONFIG_BYTES, SCORES, THRESHOLDS, checked, read_header
from cmaclip_fast.data.classes import labelled
from cmaclip_fast.data.named import Taxonomy, applies_task
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation.calibration import Calibration, Method, calibrated_probabilities, fit_calibrations
from cmaclip_fast.evaluation.evaluate import Classified
from cmaclip_fast.evaluation.hierarchy import hierarchical_metrics
from cmaclip_fast.evaluation.promise import Promise, promises
from cmaclip_fast.evaluation.thresholds import (
    ASSURANCE,
    Threshold,
    choose_class_thresholds,
    choose_label_thresholds,
    choose_threshold,
)
from cmaclip_fast.files import write_json, write_tensors
from cmaclip_fast.systems.base import System
from cmaclip_fast.untrusted import read_json

MAX_SCORES_BYTES = 2**32

Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Scores:
    """A task's answers for the validation rows: confidence, most probable class, and label (-1: none), each `[N]`.

    Of a multi-label task the confidence in each class and the labels, `[N, C_task]` each, and `predicted` is None.
    """

    confidence: Tensor
    predicted: Tensor | None
    labels: Tensor


class TaskThresholds(BaseModel):
    """The thresholds of a task, in `thresholds.json`.

    Attributes:
        target_precision, assurance: what the thresholds promise, and with which probability.
        threshold: the confidence from which an answer is accepted; None accepts none.
        rows, accepted, right: labelled validation rows, those accepted, and those among them whose answer is right; of
            a multi-label task the accepted pairs of a row and a class, and those that are right.
        per_class: whether classes may have their own.
        classes: by class name the threshold of a class that has its own; the others take the task's.
    """

    model_config = ConfigDict(extra="forbid")

    target_precision: Annotated[float, Field(gt=0, le=1)]
    assurance: Annotated[float, Field(gt=0, lt=1)] = ASSURANCE
    threshold: Probability | None
    rows: Annotated[int, Field(ge=0)]
    accepted: Annotated[int, Field(ge=0)]
    right: Annotated[int, Field(ge=0)]
    per_class: bool = False
    classes: dict[str, Probability | None] = {}


class _TaskCalibration(BaseModel):
    model_config = ConfigDict(extra="forbid")

    temperature: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    bias: list[Annotated[float, Field(allow_inf_nan=False)]] = []


class _Calibrations(RootModel[dict[str, _TaskCalibration]]):
    pass


class _Thresholds(RootModel[dict[str, TaskThresholds]]):
    pass


@dataclass(frozen=True)
class Decisions:
    """The calibration and the thresholds of a model.

    Attributes:
        tasks, taxonomies, multi_label, applies: the model's.
        calibrations: by task.
        thresholds: by task; a task without any is never accepted.
        scores: by task, what thresholds are chosen from.
        per_class: whether classes have thresholds of their own; those of multi-label tasks have in any case.
    """

    tasks: Mapping[str, Sequence[str]]
    taxonomies: Sequence[Taxonomy]
    calibrations: Mapping[str, Calibration]
    thresholds: Mapping[str, TaskThresholds]
    scores: Mapping[str, Scores]
    per_class: bool = False
    multi_label: Sequence[str] = ()
    applies: Sequence[str] = ()

    @classmethod
    def fit(
        cls,
        system: System,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        target_precision: float = 0.9,
        per_class: bool = False,
        method: Method = "temperature",
    ) -> Decisions:
        """Calibrates and chooses thresholds on the validation rows.

        Args:
            logits, labels: `[N, C_task]` and `[N]` (-1 where unlabelled) for each task; the labels of a multi-label
                task are `[N, C_task]` (see `encode`).
        """
        tasks, taxonomies, multi_label = system.tasks, system.taxonomies, system.multi_label
        calibrations = fit_calibrations(logits, labels, tasks, taxonomies, method)
        scores = {}
        found = calibrated_probabilities(logits, tasks, taxonomies, calibrations, multi_label)
        for task, probabilities in found.items():
            if task in multi_label and task in labels:
                scores[task] = Scores(probabilities, None, labels[task])
            elif task in labels:
                scores[task] = Scores(*probabilities.max(1), labels[task])
        made = cls(tasks, taxonomies, calibrations, {}, scores, per_class, multi_label, system.applies)
        return made.with_min_precision(target_precision)

    def with_min_precision(self, precision: float) -> Decisions:
        """The same calibration with thresholds for another precision, chosen from the stored validation answers.

        Raises:
            InputError: a precision that is not in (0, 1].
        """
        if not 0 < precision <= 1:
            raise InputError(f"min_precision {precision!r}: give a number over 0, and 1 at most")
        thresholds: dict[str, TaskThresholds] = {}
        kept: dict[str, Tensor] = {}
        for task in self._in_order(self.scores):
            scores = self.scores[task]
            known = labelled(scores.labels)
            # where a task above this one is not accepted, this one is not, so such rows are no evidence
            above = kept.get(self._parents.get(task, ""), torch.ones_like(known))
            usable = known & above
            confidence, labels = scores.confidence[usable], scores.labels[usable]
            of_class: dict[int, Threshold] = {}
            if scores.predicted is None:
                found = choose_threshold(confidence.flatten(), (labels == 1).flatten(), precision)
                of_class = choose_label_thresholds(confidence, labels == 1, precision)
            else:
                predicted = scores.predicted[usable]
                found = choose_threshold(confidence, predicted == labels, precision)
                if self.per_class:
                    of_class = choose_class_thresholds(confidence, predicted, labels, precision)
            thresholds[task] = TaskThresholds(
                target_precision=precision,
                threshold=found.value,
                rows=int(known.sum()),
                accepted=found.accepted,
                right=found.right,
                per_class=self.per_class or task in self.multi_label,
                classes={self.tasks[task][number]: own.value for number, own in of_class.items()},
            )
            if scores.predicted is not None:
                lowest = _lowest(self.tasks[task], thresholds[task])
                kept[task] = (
                    above & (scores.confidence >= lowest[scores.predicted]) & self._opens(task, scores.predicted)
                )
        return replace(self, thresholds={task: thresholds[task] for task in self.scores})

    @property
    def target_precision(self) -> float:
        """The precision that the thresholds promise."""
        return next((found.target_precision for found in self.thresholds.values()), 0.9)

    def promises(self, answers: Classified) -> dict[str, Promise]:
        """Whether the promise of each task with thresholds holds for answers to labelled rows, calibrated by these."""
        accepted = self.accepted(answers.confidence, answers.predicted, answers.scores)
        targets = {task: found.target_precision for task, found in self.thresholds.items()}
        return promises(accepted, answers.predicted, answers.labels, targets)

    def hierarchies(self, answers: Classified) -> dict[str, dict[str, dict[str, float]]]:
        """For each labelled taxonomy its hierarchical metrics: of the whole paths, and of the accepted parts."""
        accepted = self.accepted(answers.confidence, answers.predicted, answers.scores)
        return {
            taxonomy.column: {
                kind: hierarchical_metrics(taxonomy, self.tasks, answers.predicted, answers.labels, mask)
                for kind, mask in (("whole", None), ("accepted", accepted))
            }
            for taxonomy in self.taxonomies
            if taxonomy.levels_in(self.tasks)[-1] in answers.labels
        }

    def probabilities(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The calibrated probabilities `[B, C_task]` of each task."""
        return calibrated_probabilities(logits, self.tasks, self.taxonomies, self.calibrations, self.multi_label)

    def accepted(
        self,
        confidence: Mapping[str, Tensor],
        predicted: Mapping[str, Tensor],
        scores: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """Which rows are accepted, `[B]` bool for each task; of a multi-label task which classes, `[B, C_task]`.

        Below a level of a taxonomy that is not accepted none is, and none where it is not accepted that the task
        applies.

        Args:
            confidence, predicted: `[B]` for each task, the calibrated probability of the most probable class and its
                number.
            scores: `[B, C_task]` for each multi-label task, the calibrated probabilities.
        """
        found: dict[str, Tensor] = {}
        opened: dict[str, Tensor] = {}
        for task in self._in_order(confidence):
            lowest = self._lowest_of[task].to(confidence[task].device)
            taken = scores[task] >= lowest if task in scores else confidence[task] >= lowest[predicted[task]]
            if (above := self._parents.get(task)) in opened:
                taken &= opened[above][:, None] if task in scores else opened[above]
            found[task] = taken
            if task not in scores:
                opened[task] = taken & self._opens(task, predicted[task])
        return {task: found[task] for task in confidence}

    def inapplicable(self, accepted: Mapping[str, Tensor], predicted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where it is accepted that a task does not apply, `[B]` bool for each task that may not.

        Args:
            accepted, predicted: as `accepted` gives and takes them.
        """
        no = {task: accepted[task] & (predicted[task] == 0) for task in self._questions if task in accepted}
        found = {task: no[derived] for task in self.applies if (derived := applies_task(task)) in no}
        for task in self._in_order(predicted):
            if (above := self._parents.get(task)) in found:
                found[task] = found[above]
        return found

    @cached_property
    def _parents(self) -> dict[str, str]:
        """The task that must be accepted first: whether a task applies, and the level above one of a taxonomy."""
        levels = (taxonomy.levels_in(self.tasks) for taxonomy in self.taxonomies)
        above = {below: above for tasks in levels for above, below in pairwise(tasks)}
        return above | {task: applies_task(task) for task in self.applies}

    @cached_property
    def _questions(self) -> set[str]:
        """The tasks that say whether others apply."""
        return {applies_task(task) for task in self.applies}

    def _opens(self, task: str, predicted: Tensor) -> Tensor:
        """Whether an accepted answer leaves the tasks below it open: all do but that a task does not apply."""
        return predicted != 0 if task in self._questions else torch.ones_like(predicted, dtype=torch.bool)

    def _in_order(self, tasks: Iterable[str]) -> list[str]:
        """The tasks, those that say whether others apply first."""
        return sorted(tasks, key=lambda task: task not in self._questions)

    @cached_property
    def _lowest_of(self) -> dict[str, Tensor]:
        return {task: _lowest(names, self.thresholds.get(task)) for task, names in self.tasks.items()}

    def save(self, directory: Path) -> None:
        """Writes `calibration.json`, `thresholds.json` and `scores.safetensors` into an existing folder."""
        write_json(
            directory / CALIBRATION,
            {task: {"temperature": c.temperature, "bias": c.bias} for task, c in self.calibrations.items()},
        )
        write_json(directory / THRESHOLDS, {task: found.model_dump() for task, found in self.thresholds.items()})
        tensors = {}
        for task, scores in self.scores.items():
            for name, values in vars(scores).items():
                if values is None:
                    continue
                tensors[f"{name}/{task}"] = values.cpu().contiguous()
        write_tensors(directory / SCORES, tensors)

    @classmethod
    def load(cls, directory: Path, system: System) -> Decisions:
        """Reads and checks the files of an artefact.

        Raises:
            InputError: a file is missing, damaged, or not of this model.
        """
        path = directory / CALIBRATION
        calibrations = {
            task: Calibration(tuple(found.temperature), tuple(found.bias))
            for task, found in checked(_Calibrations, read_json(path, MAX_CONFIG_BYTES), path).root.items()
        }
        for task, calibration in calibrations.items():
            if task not in system.tasks or not calibration.fits(len(system.tasks[task])):
                raise InputError(f"{path}: field '{task}' is not that of this model's tasks: {_REMEDY}")
        path = directory / THRESHOLDS
        thresholds = checked(_Thresholds, read_json(path, MAX_CONFIG_BYTES), path).root
        for task, found in thresholds.items():
            if task not in system.tasks or not found.classes.keys() <= set(system.tasks[task]):
                raise InputError(f"{path}: field '{task}' is not that of this model's tasks: {_REMEDY}")
        multi_label = system.multi_label
        scores = _load_scores(directory / SCORES, system.tasks, multi_label)
        per_class = any(found.per_class for task, found in thresholds.items() if task not in multi_label)
        tasks, taxonomies, applies = system.tasks, system.taxonomies, system.applies
        return cls(tasks, taxonomies, calibrations, thresholds, scores, per_class, multi_label, applies)


def _lowest(names: Sequence[str], thresholds: TaskThresholds | None) -> Tensor:
    """The confidence from which each class is accepted, `[C]`."""
    if thresholds is None:
        return torch.full((len(names),), torch.inf)
    own = {name: torch.inf if value is None else value for name, value in thresholds.classes.items()}
    of_task = torch.inf if thresholds.threshold is None else thresholds.threshold
    return torch.tensor([own.get(name, of_task) for name in names])


_REMEDY = "restore the file, or train again"

_KINDS = {"confidence": "F32", "predicted": "I64", "labels": "I64"}
_KINDS_OF_SEVERAL = {"confidence": "F32", "labels": "I8"}


def _load_scores(path: Path, tasks: Mapping[str, Sequence[str]], multi_label: Sequence[str]) -> dict[str, Scores]:
    header = read_header(path, MAX_SCORES_BYTES)
    for name, (shape, kind) in header.items():
        field, _, task = name.partition("/")
        kinds, width = (_KINDS_OF_SEVERAL, (len(tasks[task]),)) if task in multi_label else (_KINDS, ())
        same = {header.get(f"{other}/{task}", (None,))[0] for other in kinds}
        if kinds.get(field) != kind or task not in tasks or shape[1:] != width or not shape or same != {shape}:
            raise InputError(f"{path}: '{name[:200]}' is not one of this model's scores: {_REMEDY}")
    tensors = load_file(path)
    found = {}
    for task, classes in tasks.items():
        if f"labels/{task}" not in tensors:
            continue
        scores = Scores(*(tensors.get(f"{field}/{task}") for field in _KINDS))  # type: ignore[arg-type]
        predicted, most = scores.predicted, 2 if task in multi_label else len(classes)
        fit = (
            ((scores.confidence >= 0) & (scores.confidence <= 1)).all()
            and (predicted is None or ((predicted >= 0) & (predicted < len(classes))).all())
            and ((scores.labels >= -1) & (scores.labels < most)).all()
        )
        if not fit:
            raise InputError(f"{path}: scores of task '{task}' are out of range: {_REMEDY}")
        found[task] = scores
    return found
