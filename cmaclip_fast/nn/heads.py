"""The heads of all tasks, computed together: a few large products instead of two small ones for each task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cmaclip_fast.nn.laid_out import linear


class TaskLinear(nn.Linear):
    """A linear layer for each task: one batched product for all tasks that have the same number of outputs.

    Initialised as an `nn.Linear` for each task would be.

    Attributes:
        weight, bias: `[N, D]`, `[N]`: the tasks' own weights, one below the other. Tasks of the same size are kept
            together, the size that comes first in the tasks' order first.
        sizes: outputs of each task.
        rows: for each task, which rows of `weight` and `bias` are its own.
    """

    order: Tensor | None
    columns: Tensor | None

    def __init__(self, width: int, sizes: Sequence[int]) -> None:
        """
        Args:
            width: D, features that each task reads.
            sizes: outputs of each task; N is their sum.
        """
        super().__init__(width, sum(sizes))
        self.sizes = tuple(sizes)
        same: dict[int, list[int]] = {}
        for task, size in enumerate(self.sizes):
            same.setdefault(size, []).append(task)
        self._groups = [(len(tasks), size) for size, tasks in same.items()]
        order = [task for tasks in same.values() for task in tasks]
        ends = list(itertools.accumulate((self.sizes[task] for task in order), initial=0))
        rows = {task: slice(*ends[place : place + 2]) for place, task in enumerate(order)}
        self.rows = tuple(rows[task] for task in range(len(self.sizes)))
        moved = order != sorted(order)
        columns = [row for part in self.rows for row in range(part.start, part.stop)]
        self.register_buffer("order", torch.tensor(order) if moved else None, persistent=False)
        self.register_buffer("columns", torch.tensor(columns) if moved else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, K, D]`, or `[B, D]` that all tasks read -> `[B, N]`, the outputs of task after task side by side."""
        if x.ndim == 2 or len(self.sizes) == 1:
            outputs = linear(x if x.ndim == 2 else x[:, 0], self.weight, self.bias)
            return outputs if self.columns is None else outputs.index_select(1, self.columns)
        x = x.permute(1, 2, 0)  # [K, D, B]
        if self.order is not None:
            x = x.index_select(0, self.order)
        found = [
            # the weight comes first, so that its gradient is computed in its own layout
            torch.baddbmm(bias.view(*group, 1), weight.view(*group, -1), part).flatten(0, 1)
            for group, weight, bias, part in self._parts(x)
        ]
        outputs = found[0] if len(found) == 1 else torch.cat(found)  # [N, B]
        return (outputs if self.columns is None else outputs.index_select(0, self.columns)).t()

    def _parts(self, x: Tensor) -> Iterable[tuple[tuple[int, int], Tensor, Tensor, Tensor]]:
        """For each group of tasks how many they are and their size, their weights, and their part of `x [K, D, B]`."""
        if len(self._groups) == 1:
            return [(self._groups[0], self.weight, self.bias, x)]
        # one split, not a slice for each group: the gradient of every slice would be as large as all of the weight
        rows, tasks = [math.prod(group) for group in self._groups], [tasks for tasks, _ in self._groups]
        return zip(self._groups, self.weight.split(rows), self.bias.split(rows), x.split(tasks), strict=True)


class TaskHeads(nn.Module):
    """An MLP with one hidden layer for each task; all tasks have the same hidden width."""

    def __init__(self, width: int, hidden: int, classes: Sequence[int], dropout: float = 0.0) -> None:
        """
        Args:
            width: D, features that each task reads.
            hidden: hidden width of each task's MLP.
            classes: of each task.
            dropout: of the hidden layer.
        """
        super().__init__()
        self.hidden = TaskLinear(width, [hidden] * len(classes))
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.classes = TaskLinear(hidden, classes)

    def forward(self, features: Tensor) -> Tensor:
        """`features [B, K, D]`, or `[B, D]` that all tasks read -> logits `[B, C]`, those of all tasks side by side."""
        hidden = self.dropout(self.activation(self.hidden(features)))
        return self.classes(hidden.unflatten(1, (len(self.classes.sizes), -1))).contiguous()
