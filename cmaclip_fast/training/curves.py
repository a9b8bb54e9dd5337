"""Measurements of a trained system for a comparison: metrics, also by value of a column, and robustness curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.noise import Kind, Noise, NoisyTable, add_noise
from cmaclip_fast.data.table import Table
from cmaclip_fast.evaluation.cost import forward_flops, parameters
from cmaclip_fast.evaluation.evaluate import Classified, classify
from cmaclip_fast.systems.base import System
from cmaclip_fast.training.measure import mean_weights

SHARES = (0.25, 0.5, 0.75, 1.0)

STRENGTHS = {"image-blur": (0.02, 0.05, 0.1, 0.2), "image-noise": (0.1, 0.25, 0.5, 1.0)}
"""Levels at which a kind of damage is measured: shares of rows, or of `STRENGTHS` strengths."""


def measure(
    model: System, test: Table, kinds: Sequence[Kind], by: str | None, target_precision: float
) -> dict[str, Any]:
    """Cost, modality weights and robustness of a trained system on the test rows.

    Args:
        kinds: of damage.
        by: a column for whose values the metrics are given too.
    """
    clean = _classify(model, test)
    first = _examples(model, test).batch(range(min(16, len(test))))
    return {
        "parameters": parameters(model),
        "flops": forward_flops(model, first),
        "weights": mean_weights(clean),
        "by": None if by is None else _by_value(clean, test.labels(by), target_precision),
        "noise": {kind: curve(model, test, kind, clean, target_precision) for kind in kinds},
    }


def _examples(model: System, table: Table) -> Examples:
    return Examples(table, model.tasks, model.preprocessing, model.tokenizer, unknown="ignore")


def _classify(model: System, table: Table) -> Classified:
    return classify(model, _examples(model, table), batch_size=128)


def curve(model: System, test: Table, kind: Kind, clean: Classified, target_precision: float) -> list[dict[str, Any]]:
    """Metrics of the test rows under growing damage of one kind, from none on.

    Which rows are hit grows with the share, and what happens to a row does not depend on it, so the answers to all
    damaged rows serve for every share.
    """
    points = [_point(0.0, clean, target_precision)]
    if kind in STRENGTHS:
        for level in STRENGTHS[kind]:
            points.append(_point(level, _classify(model, add_noise(test, Noise(kind, level))), target_precision))
        return points
    damaged = _classify(model, add_noise(test, Noise(kind, 1.0)))
    for share in SHARES:
        noisy = NoisyTable(test, Noise(kind, share))
        mixed = _mixed(clean, damaged, torch.from_numpy(noisy.hit))
        points.append(_point(share, mixed, target_precision))
    return points


def _by_value(answers: Classified, values: Sequence[str | None], target_precision: float) -> dict[str, Any]:
    """For each value, and `none`, each task's metrics on the rows that have it."""
    return {
        value: {task: numbers for task, numbers in part.headlines(target_precision).items() if numbers["rows"]}
        for value, part in answers.by_value(values).items()
    }


def _mixed(clean: Classified, damaged: Classified, hit: torch.Tensor) -> Classified:
    """The answers to `damaged` where `hit [N]`, else to `clean`."""

    def choose(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {task: torch.where(hit if v.ndim == 1 else hit[:, None], other[task], v) for task, v in one.items()}

    weights = None
    if clean.weights is not None and damaged.weights is not None:
        weights = choose(clean.weights, damaged.weights)
    return replace(
        clean,
        predicted=choose(clean.predicted, damaged.predicted),
        confidence=choose(clean.confidence, damaged.confidence),
        likelihood=choose(clean.likelihood, damaged.likelihood),
        scores=choose(clean.scores, damaged.scores),
        weights=weights,
        present=torch.where(hit[:, None], damaged.present, clean.present),
    )


def _point(level: float, answers: Classified, target_precision: float) -> dict[str, Any]:
    tasks = {
        task: {name: value for name, value in numbers.items() if name != "rows"}
        for task, numbers in answers.headlines(target_precision).items()
        if numbers["rows"]
    }
    text = None if answers.weights is None else {t: float(w[:, 0].mean()) for t, w in answers.weights.items()}
    return {"level": level, "tasks": tasks, "text_weight": text}
