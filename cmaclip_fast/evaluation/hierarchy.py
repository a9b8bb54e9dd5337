"""Hierarchical precision, recall and F1 over a taxonomy: what is shared of two paths counts, not only their ends.

The set-based measures of Kiritchenko et al. (2006), as Silla and Freitas define them in "A survey of hierarchical
classification across different application domains" (2011), section 5: the classes of a path are the nodes from the top
to its end, and precision and recall are taken over all nodes of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cmaclip_fast.data.named import Taxonomy


def hierarchical_metrics(
    taxonomy: Taxonomy,
    tasks: Mapping[str, Sequence[str]],
    predicted: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    accepted: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """`precision`, `recall`, `f1` and `rows`, over the rows whose class of the last level is known.

    Args:
        tasks: the class names of each task.
        predicted, labels: `[N]` for each level, labels -1 where unlabelled.
        accepted: `[N]` bool for each level; the predicted path is then cut below the last accepted level.
    """
    levels = taxonomy.levels_in(tasks)
    last = levels[-1]
    known = (labels[last] >= 0).nonzero().flatten()
    paths = {level: [taxonomy.names(name) for name in tasks[level]] for level in levels}
    truths = [paths[last][number] for number in labels[last][known].tolist()]
    said: list[list[str]] = [[] for _ in truths]
    for level in levels:
        taken = [True] * len(said) if accepted is None else accepted[level][known].tolist()
        for row, (number, take) in enumerate(zip(predicted[level][known].tolist(), taken, strict=True)):
            if take:
                said[row] = paths[level][number]
    shared = sum(
        next((depth for depth, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        for one, other in zip(said, truths, strict=True)
    )
    given, wanted = sum(map(len, said)), sum(map(len, truths))
    return {
        "precision": shared / given if given else float("nan"),
        "recall": shared / wanted if wanted else float("nan"),
        "f1": 2 * shared / (given + wanted) if given + wanted else float("nan"),
        "rows": len(truths),
    }
