"""multitask_cross_entropy in Triton: a program reads one row's classes of one task once; rows are summed in order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Below every logit but finite, so that a maximum that has seen no class can still be subtracted from minus infinity.
LOWEST = tl.constexpr(-1e38)


def forward(
    logits: Tensor, labels: Tensor, offsets: Tensor, class_weight: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`logits [B, C]`, `labels [B, K]`, `offsets [K + 1]` -> loss `[K]`, lse `[B, K]`, weight_sum `[K]`, in float32."""
    rows, tasks = labels.shape
    lse = logits.new_empty(rows, tasks, dtype=torch.float32)
    loss, weight_sum = lse.new_empty(tasks), lse.new_empty(tasks)
    row_loss, row_weight = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel() > 0:
        row_kernel[(rows, tasks)](
            *(logits, labels, offsets, class_weight, row_loss, row_weight, lse),
            *(logits.shape[1], 1 - label_smoothing, label_smoothing),
            **_constants(logits, tasks, label_smoothing),
        )
    if tasks > 0:
        loss_kernel[(triton.cdiv(tasks, 16),)](
            row_loss, row_weight, loss, weight_sum, rows, tasks, BLOCK_B=64, BLOCK_K=16
        )
    return loss, lse, weight_sum


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    lse: Tensor,
    weight_sum: Tensor,
) -> Tensor:
    """The gradient `[B, C]` of the logits."""
    rows, tasks = labels.shape
    grad_logits = logits.new_empty(logits.shape)
    if rows > 0 and tasks > 0:
        constants = _constants(logits, tasks, label_smoothing)
        # Programs that share a task's classes: how many classes a task has, only the device knows.
        shares = min(triton.cdiv(logits.shape[1], tasks * constants["BLOCK_C"]), 16)
        grad_kernel[(rows, tasks, shares)](
            *(grad_loss, logits, labels, offsets, class_weight, lse, weight_sum, grad_logits),
            *(logits.shape[1], 1 - label_smoothing, label_smoothing),
            **constants,
        )
    return grad_logits


def _constants(logits: Tensor, tasks: int, label_smoothing: float) -> dict[str, Any]:
    mean_classes = triton.cdiv(logits.shape[1], tasks)
    block = min(max(triton.next_power_of_2(mean_classes), 32), 1024)
    return {"SMOOTH": label_smoothing > 0, "BLOCK_C": block, "num_warps": max(block // 256, 1)}


@triton.jit
def row_kernel(
    logits,
    labels,
    offsets,
    class_weight,
    row_loss,
    row_weight,
    lse,
    width,
    label_share,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, task, tasks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first, end = tl.load(offsets + task), tl.load(offsets + task + 1)
    x_row = logits + row * width

    # Each lane keeps the maximum of its own classes and sums against it; lanes meet once, after the loop.
    most = tl.full([BLOCK_C], LOWEST, tl.float32)
    total = tl.full([BLOCK_C], 0.0, tl.float32)
    weights = tl.full([BLOCK_C], 0.0, tl.float32)
    below = tl.full([BLOCK_C], 0.0, tl.float32)  # weighted sum of the distances to the maximum
    for start in range(first, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < end
        x = tl.load(x_row + c, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, x)
        total = total * tl.exp(most - larger) + tl.exp(x - larger)
        if SMOOTH:
            weight = tl.where(inside, 1.0, 0.0)
            if class_weight is not None:
                weight = tl.load(class_weight + c, mask=inside, other=0).to(tl.float32)
            below += weights * (larger - most) + weight * tl.where(inside, larger - x, 0.0)
            weights += weight
        most = larger
    top = tl.max(most, axis=0)
    level = top + tl.log(tl.sum(total * tl.exp(most - top), axis=0))
    tl.store(lse + row * tasks + task, level)

    label = tl.load(labels + row * tasks + task)
    kept = label >= 0
    at = first + tl.minimum(tl.maximum(label, 0), end - first - 1)
    x_label = tl.load(x_row + at, mask=kept, other=0).to(tl.float32)
    label_weight = tl.where(kept, 1.0, 0.0)
    if class_weight is not None:
        label_weight = tl.load(class_weight + at, mask=kept, other=0).to(tl.float32)
    loss = label_share * label_weight * (level - x_label)
    if SMOOTH:
        distance = tl.sum(below + weights * (level - most), axis=0)
        loss += smoothing * distance / (end - first)
    loss = tl.where(label >= end - first, float("nan"), loss)
    tl.store(row_loss + row * tasks + task, tl.where(kept, loss, 0.0))
    tl.store(row_weight + row * tasks + task, label_weight)


@triton.jit
def loss_kernel(row_loss, row_weight, loss, weight_sum, rows, tasks, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    task = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    task_in = task < tasks
    losses = tl.full([BLOCK_B, BLOCK_K], 0.0, tl.float32)
    weights = tl.full([BLOCK_B, BLOCK_K], 0.0, tl.float32)
    for start in range(0, rows, BLOCK_B):
        row = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        at, inside = row[:, None] * tasks + task[None, :], (row < rows)[:, None] & task_in[None, :]
        losses += tl.load(row_loss + at, mask=inside, other=0)
        weights += tl.load(row_weight + at, mask=inside, other=0)
    weight = tl.sum(weights, axis=0)
    tl.store(loss + task, tl.sum(losses, axis=0) * _inverse(weight), mask=task_in)
    tl.store(weight_sum + task, weight, mask=task_in)


@triton.jit
def _inverse(weight):
    # A task without labels costs 0, not 0 / 0.
    return tl.where(weight > 0, 1 / tl.where(weight > 0, weight, 1.0), 0.0)


@triton.jit
def grad_kernel(
    grad_loss,
    logits,
    labels,
    offsets,
    class_weight,
    lse,
    weight_sum,
    grad_logits,
    width,
    label_share,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, task, tasks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first, end = tl.load(offsets + task), tl.load(offsets + task + 1)
    label, level = tl.load(labels + row * tasks + task), tl.load(lse + row * tasks + task)
    kept = label >= 0
    factor = tl.load(grad_loss + task) * _inverse(tl.load(weight_sum + task))
    label_weight = tl.where(kept, label_share, 0.0)
    if class_weight is not None:
        at = first + tl.minimum(tl.maximum(label, 0), end - first - 1)
        label_weight *= tl.load(class_weight + at, mask=kept, other=0).to(tl.float32)
    share = smoothing / (end - first)
    spread = smoothing
    if SMOOTH and class_weight is not None:
        weights = tl.full([BLOCK_C], 0.0, tl.float32)
        for start in range(first, end, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            weights += tl.load(class_weight + c, mask=c < end, other=0).to(tl.float32)
        spread = share * tl.sum(weights, axis=0)

    for start in range(first + tl.program_id(2) * BLOCK_C, end, tl.num_programs(2) * BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < end
        x = tl.load(logits + row * width + c, mask=inside, other=float("-inf")).to(tl.float32)
        grad = (label_weight + spread) * tl.exp(x - level)
        if SMOOTH:
            weight = 1.0
            if class_weight is not None:
                weight = tl.load(class_weight + c, mask=inside, other=0).to(tl.float32)
            grad -= share * weight
        grad -= tl.where(c == first + label, label_weight, 0.0)
        grad = tl.where(label >= end - first, float("nan"), grad)
        grad = tl.where(kept, grad, 0.0) * factor
        tl.store(grad_logits + row * width + c, grad.to(grad_logits.dtype.element_ty), mask=inside)
