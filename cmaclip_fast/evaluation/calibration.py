"""Calibration: logits scaled on validation rows, so that a probability of 0.8 is right in 8 cases of 10.

Temperature scaling divides the logits of a task by one number; vector scaling divides those of each class by a number
of its own and adds one (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2). Both minimise
the negative log-likelihood of the validation labels. The temperature changes no answer, only its probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from cmaclip_fast.data.classes import labelled
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.systems.taxonomy import task_probabilities

Method = Literal["temperature", "vector"]

BINS = 15
"""Of the expected calibration error; each has the same number of rows."""

TEMPERATURES = (0.05, 20.0)
"""The range that a temperature is searched in."""

_VECTOR_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """What turns the logits of a task into calibrated ones: `logits / temperature + bias`.

    Attributes:
        temperature: one number, or one for each class.
        bias: one for each class, or none.
    """

    temperature: tuple[float, ...] = (1.0,)
    bias: tuple[float, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        """The calibrated logits `[B, C]`, float32."""
        scaled = logits.float() / torch.tensor(self.temperature, device=logits.device)
        return scaled + torch.tensor(self.bias, device=logits.device) if self.bias else scaled

    def fits(self, classes: int) -> bool:
        """Whether it is one for so many classes."""
        return len(self.temperature) in (1, classes) and len(self.bias) in (0, classes)


Calibrations = Mapping[str, Calibration]
"""By task; a task that is missing is left as it is."""


def calibrated_probabilities(
    logits: Mapping[str, Tensor],
    tasks: Mapping[str, Sequence[str]],
    taxonomies: Sequence[Taxonomy] = (),
    calibrations: Calibrations | None = None,
    multi_label: Collection[str] = (),
) -> dict[str, Tensor]:
    """For each task the calibrated probabilities of its classes, `[B, C_task]`; see `task_probabilities`."""
    known = calibrations or {}
    calibrated = {task: known[task](values) if task in known else values for task, values in logits.items()}
    return task_probabilities(calibrated, tasks, taxonomies, multi_label)


def fit_calibrations(
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    tasks: Mapping[str, Sequence[str]],
    taxonomies: Sequence[Taxonomy] = (),
    method: Method = "temperature",
) -> dict[str, Calibration]:
    """The calibration of each task that minimises the negative log-likelihood of its labels.

    Along a taxonomy the levels are fitted from the top, each with those above it calibrated already.

    Args:
        logits: `[N, C_task]` for each task.
        labels: `[N]` int64 for each task, -1 where unlabelled, or of a multi-label task `[N, C_task]` (see `encode`); a
            task without labelled rows stays uncalibrated.
    """
    found: dict[str, Calibration] = {}
    for task in tasks:
        of_task = labels.get(task)
        if of_task is None or not (chosen := labelled(of_task)).any():
            continue
        wanted = of_task[chosen]
        if of_task.ndim == 2:
            found[task] = _several(logits[task][chosen].float(), wanted.float(), method)
            continue
        taxonomy = next((t for t in taxonomies if task in t.levels_in(tasks)), None)
        levels = [task] if taxonomy is None else taxonomy.levels_in(tasks)
        known = {level: tasks[level] for level in levels[: levels.index(task) + 1]}
        part = {level: logits[level][chosen].float() for level in known}
        part = {level: found[level](values) if level in found else values for level, values in part.items()}
        temperature = _temperature(part, task, wanted, known, [] if taxonomy is None else [taxonomy])
        found[task] = Calibration((temperature,))
        if method == "vector" and taxonomy is None:
            found[task] = _vector(part[task], wanted, temperature)
    return found


def _temperature(
    logits: Mapping[str, Tensor],
    task: str,
    labels: Tensor,
    tasks: Mapping[str, Sequence[str]],
    taxonomies: Sequence[Taxonomy],
) -> float:
    def loss(temperature: float) -> float:
        scaled = {**logits, task: logits[task] / temperature}
        likelihood = task_probabilities(scaled, tasks, taxonomies)[task].gather(1, labels[:, None])
        return float(-likelihood.double().clamp_min(1e-12).log().mean())

    return _least(loss)


def _least(loss: Callable[[float], float]) -> float:
    """The temperature of the least loss."""
    low, high = (math.log(value) for value in TEMPERATURES)
    best = minimize_scalar(lambda log: loss(math.exp(log)), bounds=(low, high), method="bounded")
    return math.exp(best.x) if best.fun < loss(1.0) else 1.0


def _several(logits: Tensor, labels: Tensor, method: Method) -> Calibration:
    """That of a multi-label task, `[N, C]` each: every class of every row is a case of its own."""
    loss = F.binary_cross_entropy_with_logits
    temperature = _least(lambda value: float(loss(logits.double() / value, labels.double())))
    if method == "vector":
        return _vector(logits, labels.double(), temperature, loss)
    return Calibration((temperature,))


def _vector(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Calibration:
    """Starts from the temperature; ends where the likelihood of the labels no longer rises."""
    with torch.inference_mode(False), torch.enable_grad():
        values, wanted = logits.clone().double(), labels.clone()
        scale = torch.full((values.shape[1],), 1 / temperature, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(values.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([scale, bias], max_iter=_VECTOR_STEPS, line_search_fn="strong_wolfe")

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(values * scale + bias, wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(step)
    low, high = TEMPERATURES
    temperatures = (1 / scale.detach().clamp(1 / high, 1 / low)).tolist()
    return Calibration(tuple(temperatures), tuple(bias.detach().tolist()))


@dataclass(frozen=True)
class Reliability:
    """Rows in order of their confidence, in bins of equal size (a reliability diagram).

    Attributes:
        confidence, accuracy, rows: `[BINS]` each: mean confidence, share of right answers, and number of rows.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, confidence: Tensor, predicted: Tensor, labels: Tensor) -> Reliability:
        """From the probability of the predicted class, its number, and the label (-1 where unlabelled), `[N]` each."""
        known = labels >= 0
        order = confidence[known].argsort(stable=True)
        scores = confidence[known][order].double().numpy()
        right = (predicted == labels)[known][order].double().numpy()
        ends = np.unique(np.linspace(0, len(scores), BINS + 1).round().astype(int))
        rows = np.diff(ends)
        return cls(np.add.reduceat(scores, ends[:-1]) / rows, np.add.reduceat(right, ends[:-1]) / rows, rows)

    @classmethod
    def of_scores(cls, scores: Tensor, labels: Tensor) -> Reliability:
        """Of a multi-label task, from the probability of each class and the labels, `[N, C]` each: of every class."""
        return cls.of(scores.flatten(), torch.ones(labels.numel(), dtype=labels.dtype), labels.flatten())

    def record(self) -> dict[str, float]:
        """As JSON files hold it."""
        return {"expected_calibration_error": self.error, "by_chance": self.chance}

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance between confidence and accuracy; NaN without rows."""
        if not len(self.rows):
            return math.nan
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.rows))

    @property
    def chance(self) -> float:
        """The error that confidences without any fault are expected to show on so few rows; NaN without rows.

        The mean distance of a share from its probability p over n rows is about `sqrt(2 p (1 - p) / (pi n))`.
        """
        if not len(self.rows):
            return math.nan
        distance = np.sqrt(2 * self.confidence * (1 - self.confidence) / (math.pi * self.rows))
        return float(np.average(distance, weights=self.rows))
