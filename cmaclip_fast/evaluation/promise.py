"""Whether the promise of the thresholds holds on other rows: the precision of what is accepted, beside the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cmaclip_fast.data.classes import labelled
from cmaclip_fast.evaluation.thresholds import ASSURANCE, precision_bound


@dataclass(frozen=True)
class Promise:
    """A task's accepted answers on labelled rows.

    Attributes:
        target: the precision that was promised.
        rows: labelled rows.
        accepted: rows among them whose answer is accepted.
        right: rows among those whose answer is right; of a multi-label task the accepted classes that are right.
        answers: accepted classes of a multi-label task, of which a row can have several; None: one for each row.
    """

    target: float
    rows: int
    accepted: int
    right: int
    answers: int | None = None

    @property
    def given(self) -> int:
        """The accepted answers."""
        return self.accepted if self.answers is None else self.answers

    @property
    def coverage(self) -> float:
        """The share of the labelled rows that is accepted; NaN without rows."""
        return self.accepted / self.rows if self.rows else math.nan

    @property
    def precision(self) -> float:
        """The share of the accepted answers that is right; NaN where nothing is accepted."""
        return self.right / self.given if self.given else math.nan

    @property
    def verdict(self) -> str:
        """Whether the precision reaches the target, and if not, by how many points it misses it and if by chance."""
        if not self.accepted:
            return "nothing accepted"
        if self.precision >= self.target:
            return "kept"
        missed = f"missed by {100 * (self.target - self.precision):.1f} points"
        # the upper bound of Clopper and Pearson is the lower one of the rows that are wrong
        highest = 1 - float(precision_bound(self.given - self.right, self.given, 1 - ASSURANCE))
        return f"{missed}, within chance" if highest >= self.target else missed

    def record(self) -> dict[str, Any]:
        """As JSON files hold it."""
        return {
            "target_precision": self.target,
            "rows": self.rows,
            "accepted": self.accepted,
            **({} if self.answers is None else {"answers": self.answers}),
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
        accepted: `[N]` bool for each task; of a multi-label task `[N, C_task]`, which classes are.
        predicted, labels: `[N]` for each task; labels are -1 where unlabelled. Of a multi-label task the labels are
            `[N, C_task]`, and what is predicted does not count.
    """
    found = {}
    for task, of_task in labels.items():
        if task in targets:
            known = labelled(of_task)
            rows = int(known.sum())
            if of_task.ndim == 2:
                taken = known[:, None] & accepted[task]
                right = taken & (of_task == 1)
                some = int(taken.any(1).sum())
                found[task] = Promise(targets[task], rows, some, int(right.sum()), int(taken.sum()))
                continue
            taken = known & accepted[task]
            right = taken & (predicted[task] == of_task)
            found[task] = Promise(targets[task], rows, int(taken.sum()), int(right.sum()))
    return found


def sentences_of_absence(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """For each task that may not apply how well that is found, from `Classified.not_applicable`."""
    return [
        f"{task}: of {m['rows']:,} rows that it does not apply to {m['recall']:.1%} are found, "
        f"with a precision of {m['precision']:.1%}".replace("nan%", "-")
        for task, m in found.items()
    ]


def sentences(found: Mapping[str, Promise]) -> list[str]:
    """For each task how many rows can be published without a look, at which precision, and how many need a person."""
    said = []
    for task, promise in found.items():
        left = promise.rows - promise.accepted
        if promise.accepted:
            what = "them" if promise.answers is None else f"their {promise.answers:,} labels"
            said.append(
                f"{task}: {promise.accepted:,} of {promise.rows:,} rows ({promise.coverage:.0%}) can be published "
                f"without a look, {promise.precision:.1%} of {what} right "
                f"(target {promise.target:.0%}); {left:,} need a person"
            )
        else:
            said.append(
                f"{task}: no threshold is shown to reach a precision of {promise.target:.0%}: "
                f"all {promise.rows:,} rows need a person"
            )
    return said
