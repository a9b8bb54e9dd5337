"""Whether a text fits its picture: by similarity, or by what each alone says of the tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

_TELLS_APART = 0.75
"""The area under the ROC curve, own texts against strangers', from which a similarity is used."""

_LISTED = 0.2
"""The share of strange pairs that fit better than any pair that is listed, and that a list therefore may miss."""

_SAYS_SOMETHING = 0.55
"""The area from which a task counts."""


@dataclass(frozen=True)
class Misfits:
    """Pairs whose text fits hardly better than the text of another row does.

    Attributes:
        scores: `[M]`, 0 to 1, of each pair; higher fits worse.
        places: `[K]`, the pairs that fit worse than a fifth of the strange ones do, the worst first.
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
    return Misfits(own, order[own[order] >= np.quantile(strange, _LISTED)], area)


def disagreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`[N]`, the Jensen-Shannon divergence of probabilities `[N, C]`, in bits: 0 where equal, 1 where disjoint."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    mean = ((one + other) / 2).clip(min=1e-12)

    def divergence(part: np.ndarray) -> np.ndarray:
        return np.asarray((part * np.log2(part.clip(min=1e-12) / mean)).sum(1))

    return ((divergence(one) + divergence(other)) / 2).clip(0, 1)


def telling_tasks(own: dict[str, np.ndarray], strange: dict[str, np.ndarray]) -> list[str]:
    """The tasks of which text and picture both say enough that their disagreement means something.

    Args:
        own, strange: for each task as `misfits`.
    """
    return [task for task in own if misfits(own[task], strange[task]).area > _SAYS_SOMETHING]
