"""Whether a text fits its picture: by similarity, or by what each alone says of the tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

_TELLS_APART = 0.75
"""The area under the ROC curve, own texts against strangers', from which a similarity is used."""

_SAYS_SOMETHING = 0.55
"""The same, from which a task counts."""


@dataclass(frozen=True)
class Misfits:
    """Pairs whose text fits no better than the text of another row does.

    Attributes:
        scores: `[M]`, 0 to 1, of each pair; higher fits worse.
        places: `[K]`, the pairs that fit worse than half of the strange ones, the worst first.
        area: under the ROC curve: how well the scores tell pairs from strange ones; 0.5 not at all.
    """

    scores: np.ndarray
    places: np.ndarray
    area: float

    @property
    def tells_apart(self) -> bool:
        return self.area >= _TELLS_APART


def misfits(own: np.ndarray, strange: np.ndarray) -> Misfits:
    """
    Args:
        own: `[M]`, how badly each row's text fits its picture.
        strange: `[M]`, the same with the texts of other rows.
    """
    area = float(roc_auc_score(np.repeat([0, 1], [len(own), len(strange)]), np.concatenate([own, strange])))
    order = np.argsort(-own, kind="stable")
    return Misfits(own, order[own[order] >= np.median(strange)], area)


def disagreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`[N]`, the Jensen-Shannon divergence of probabilities `[N, C]`, in bits: 0 where equal, 1 where disjoint."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    mean = ((one + other) / 2).clip(min=1e-12)

    def divergence(part: np.ndarray) -> np.ndarray:
        return np.asarray((part * np.log2(part.clip(min=1e-12) / mean)).sum(1))

    return ((divergence(one) + divergence(other)) / 2).clip(0, 1)


def weights(own: dict[str, np.ndarray], strange: dict[str, np.ndarray]) -> dict[str, float]:
    """How much each task says of the fit: the area under its ROC curve above 0.5, as a share of all tasks'.

    Args:
        own, strange: for each task as `misfits`.

    Returns:
        Only tasks of which text and picture both say something; they sum to 1.
    """
    areas = {task: misfits(own[task], strange[task]).area for task in own}
    found = {task: area - 0.5 for task, area in areas.items() if area > _SAYS_SOMETHING}
    return {task: weight / sum(found.values()) for task, weight in found.items()}
