"""The loops over tasks that `modality_pool`, the losses of many tasks and `TaskHeads` replace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmaclip_fast.nn.heads import TaskHeads, TaskLinear


def keyless_attention(embeddings: Tensor, vector: Tensor, present: Tensor | None = None) -> Tensor:
    """One task's weighted sum: `embeddings [B, M, D]`, `vector [D]` or `[M, D]`, `present [B, M]` -> `[B, D]`."""
    scores = (embeddings * vector).sum(-1)
    if present is not None:
        scores = scores.masked_fill(~present, -torch.inf)
    return (scores.softmax(-1)[..., None] * embeddings).sum(1)


class KeylessAttention(nn.Module):
    """One task's modality-wise attention, as a module of its own."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector.detach().clone())

    def forward(self, embeddings: Tensor) -> Tensor:
        """`[B, M, D] -> [B, D]`, every modality present."""
        return keyless_attention(embeddings, self.vector)


def keyless_loop(embeddings: Tensor, weight: Tensor, present: Tensor) -> Tensor:
    """`modality_pool` task by task: `weight [K, M, D]` -> `[B, K, D]`."""
    return torch.stack([keyless_attention(embeddings, vector, present) for vector in weight], 1)


def cross_entropy_loop(logits: Tensor, labels: Tensor, bounds: Sequence[int]) -> Tensor:
    """`multitask_cross_entropy` task by task: columns `bounds[k]` to `bounds[k + 1]` of `logits` -> `[K]`."""
    parts: Iterable[tuple[int, int]] = itertools.pairwise(bounds)
    return torch.stack(
        [F.cross_entropy(logits[:, a:b].float(), labels[:, k], ignore_index=-1) for k, (a, b) in enumerate(parts)]
    )


def binary_cross_entropy_loop(
    logits: Tensor,
    targets: Tensor,
    bounds: Sequence[int],
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
) -> Tensor:
    """`multitask_binary_cross_entropy` task by task, as the authors of the asymmetric loss write it -> `[K]`."""
    losses = []
    for a, b in itertools.pairwise(bounds):
        target, p = targets[:, a:b], logits[:, a:b].float().sigmoid()
        has, has_not = (target == 1).float(), (target == 0).float()
        rest = (1 - p + margin).clamp(max=1)
        loss = has * p.clamp(min=1e-8).log() + has_not * rest.clamp(min=1e-8).log()
        exponent = gamma_positive * has + gamma_negative * has_not
        loss = loss * (1 - p * has - rest * has_not).pow(exponent)
        losses.append(-loss.sum() / (target >= 0).sum().clamp(min=1))
    return torch.stack(losses)


def heads_apart(heads: TaskHeads) -> nn.ModuleList:
    """A module for each task, `[B, D] -> [B, C_task]`, that computes what `heads` do; weights are views of theirs."""
    hidden, classes = _layers_apart(heads.hidden), _layers_apart(heads.classes)
    rate = heads.dropout.p
    return nn.ModuleList(
        nn.Sequential(expand, nn.GELU(), nn.Dropout(rate), contract)
        for expand, contract in zip(hidden, classes, strict=True)
    ).train(heads.training)


def _layers_apart(layer: TaskLinear) -> list[nn.Linear]:
    apart = []
    for rows in layer.rows:
        one = nn.Linear(layer.in_features, rows.stop - rows.start, device="meta")
        one.weight, one.bias = (nn.Parameter(tensor.detach()[rows]) for tensor in (layer.weight, layer.bias))
        apart.append(one)
    return apart
