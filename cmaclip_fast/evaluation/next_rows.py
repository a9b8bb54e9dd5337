"""Which rows to label next: uncertain ones that are unlike each other."""

from __future__ import annotations

import numpy as np

_CANDIDATES = 20
"""Rows that are considered for each that is wanted, the most uncertain ones."""


def next_rows(features: np.ndarray, uncertainty: np.ndarray, wanted: int) -> list[int]:
    """Rows in the order to label them: each the one with the largest product of uncertainty and of distance to those
    before it, so that a batch of any size is both uncertain and diverse.

    Args:
        features: `[N, D]`.
        uncertainty: `[N]`, 0 to 1.
    """
    wanted = min(wanted, len(features))
    rows = np.argsort(-uncertainty, kind="stable")[: _CANDIDATES * wanted]
    if not len(rows):
        return []
    points = features[rows].astype(np.float32)
    points = (points - points.mean(0)) / points.std(0).clip(min=1e-6)
    worth = uncertainty[rows] + 1e-6
    distance = np.ones(len(rows), dtype=np.float32)
    taken = np.zeros(len(rows), dtype=bool)
    chosen: list[int] = []
    for _ in range(wanted):
        place = int(np.where(taken, -1, worth * distance).argmax())
        taken[place] = True
        nearest = np.sqrt(((points - points[place]) ** 2).mean(1))
        distance = nearest if not chosen else np.minimum(distance, nearest)
        chosen.append(int(rows[place]))
    return chosen
