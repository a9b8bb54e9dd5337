"""Whether the promise of the thresholds holds on other rows: the precision of what is accepted, beside the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cmaclip_fast.evaluation.thresholds import ASSURANCE, precision_bound


@dataclass(frozen=True)
class Promise:
    """A task's accepted answers on labelled rows.

    Attributes:
        target: the precision that was promised.
        rows: labelled rows.
        accepted: rows among them whose answer is accepted.
        right: rows among those whose answer is right.
    """

    target: float
    rows: int
    accepted: int
    right: int

    @property
    def coverage(self) -> float:
        """The share of the labelled rows that is accepted; NaN without rows."""
        return self.accepted / self.rows if self.rows else math.nan

    @property
    def precision(self) -> float:
        """The share of the accepted rows that is right; NaN where nothing is accepted."""
        return self.right / self.accepted if self.accepted else math.nan

    @property
    def verdict(self) -> str:
        """Whether the precision reaches the target, and if not, by how many points it misses it and if by chance."""
        if not self.accepted:
            return "nothing accepted"
        if self.precision >= self.target:
            return "kept"
        missed = f"missed by {100 * (self.target - self.precision):.1f} points"
        # the upper bound of Clopper and Pearson is the lower one of the rows that are wrong
        wrong = self.accepted - self.right
        highest = 1 - float(precision_bound(wrong, self.accepted, 1 - ASSURANCE))
        return f"{missed}, within chance" if highest >= self.target else missed

    def record(self) -> dict[str, Any]:
        """As JSON files hold it."""
        return {
            "target_precision": self.target,
            "rows": self.rows,
            "accepted": self.accepted,
            "right": self.right,
            "coverage": self.coverage,
            "precision": self.precision,
            "verdict": self.verdict,
        }


def promises(
    accepted: Mapping[str, Tensor],
    predicted: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    targets: Mapping[str, float],
) -> dict[str, Promise]:
    """The promise of each labelled task that has a target.

    Args:
        accepted: `[N]` bool for each task.
        predicted, labels: `[N]` for each task; labels are -1 where unlabelled.
    """
    found = {}
    for task, of_task in labels.items():
        if task in targets:
            known = of_task >= 0
            taken = known & accepted[task]
            right = taken & (predicted[task] == of_task)
            found[task] = Promise(targets[task], int(known.sum()), int(taken.sum()), int(right.sum()))
    return found


def sentences(found: Mapping[str, Promise]) -> list[str]:
    """For each task how many rows can be published without a look, at which precision, and how many need a person."""
    said = []
    for task, promise in found.items():
        left = promise.rows - promise.accepted
        if promise.accepted:
            said.append(
                f"{task}: {promise.accepted:,} of {promise.rows:,} rows ({promise.coverage:.0%}) can be published "
                f"without a look, {promise.precision:.1%} of them right "
                f"(target {promise.target:.0%}); {left:,} need a person"
            )
        else:
            said.append(
                f"{task}: no threshold is shown to reach a precision of {promise.target:.0%}: "
                f"all {promise.rows:,} rows need a person"
            )
    return said
