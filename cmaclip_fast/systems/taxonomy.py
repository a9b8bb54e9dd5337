"""Classes that form a tree: each level is a task of its own, and what is predicted lies on one path.

Product taxonomies give classes as paths ('Apparel > Dresses > Maxi'). `Taxonomy` (in `data/named.py`) makes a task of
each level; the levels are trained like any tasks, and joined here, when logits become probabilities.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmaclip_fast.data.named import Taxonomy

_JUST_BELOW = 0.999


def task_probabilities(
    logits: Mapping[str, Tensor],
    tasks: Mapping[str, Sequence[str]],
    taxonomies: Sequence[Taxonomy] = (),
    multi_label: Collection[str] = (),
) -> dict[str, Tensor]:
    """For each task the probabilities of its classes, `[B, C_task]` from logits `[B, C_task]`, in float32.

    The softmax of a task alone, the sigmoid of each class of a multi-label task; along a taxonomy, the chain rule from
    the top: a class has the probability of its parent times its share among its siblings, by the softmax of its level
    over them. Its most probable class is the
    best child of the class that is most probable one level above: a class elsewhere that would be more probable is put
    just below that child. So the arguments of the maxima lie on one path, and probabilities never rise along it.

    Args:
        tasks: the class names of each task; those of a taxonomy are paths.
        multi_label: the tasks whose rows have any number of classes.
    """
    probabilities = {
        task: values.float().sigmoid() if task in multi_label else values.float().softmax(1)
        for task, values in logits.items()
    }
    for taxonomy in taxonomies:
        levels = taxonomy.levels_in(tasks)
        chain = probabilities[levels[0]]
        for level, (above, below) in enumerate(pairwise(levels), 1):
            parents = parent_numbers(taxonomy, level, tasks[above], tasks[below]).to(chain.device)
            chain = _shares(logits[below].float(), parents, len(tasks[above])) * chain[:, parents]
            inside = parents == probabilities[above].argmax(1, keepdim=True)
            best = chain.where(inside, 0).amax(1, keepdim=True)
            probabilities[below] = chain.where(inside, chain.minimum(_JUST_BELOW * best))
    return probabilities


def parent_numbers(taxonomy: Taxonomy, level: int, above: Sequence[str], below: Sequence[str]) -> Tensor:
    """`[C_below]`: for each class of level `level + 1` the number of its parent among the classes of `level`.

    Raises:
        ValueError: a class has no parent.
    """
    numbers = {name: number for number, name in enumerate(above)}
    names = [taxonomy.upto(path, level) for path in below]
    orphans = [path for path, name in zip(below, names, strict=True) if name not in numbers]
    if orphans:
        raise ValueError(f"class '{orphans[0]}' of '{taxonomy.column}' has no parent among the classes above it")
    return torch.tensor([numbers[name] for name in names])


def _shares(logits: Tensor, parents: Tensor, count: int) -> Tensor:
    """`[B, C]`: the softmax of each class over its siblings alone, from their parents `[C]` among `count`."""
    siblings = parents.expand_as(logits)
    empty = logits.new_full((len(logits), count), -torch.inf)
    raised = (logits - empty.scatter_reduce(1, siblings, logits, "amax")[:, parents]).exp()
    return raised / torch.zeros_like(empty).scatter_add(1, siblings, raised)[:, parents]
