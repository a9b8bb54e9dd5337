"""multitask_binary_cross_entropy in Triton: a program adds some rows of some columns; parts are summed in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 64


def forward(
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """`logits`, `targets [B, C]`, `offsets [K + 1]` -> loss `[K]`, weight_sum `[K]`, in float32."""
    rows, classes = logits.shape
    tasks = len(offsets) - 1
    parts = triton.cdiv(rows, ROWS)
    losses = logits.new_empty(parts, classes, dtype=torch.float32)
    weights = torch.empty_like(losses)
    loss, weight_sum = losses.new_empty(tasks), losses.new_empty(tasks)
    if losses.numel() > 0:
        columns_kernel[(triton.cdiv(classes, COLUMNS), parts)](
            *(logits, targets, class_weight, losses, weights, rows, classes, gamma_positive, gamma_negative, margin),
            **_constants(gamma_positive, gamma_negative, margin),
        )
    if tasks > 0:
        loss_kernel[(tasks,)](losses, weights, offsets, loss, weight_sum, parts, classes, BLOCK_C=COLUMNS)
    return loss, weight_sum


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    weight_sum: Tensor,
) -> Tensor:
    """The gradient `[B, C]` of the logits."""
    rows, classes = logits.shape
    grad_logits = logits.new_empty(logits.shape)
    if grad_logits.numel() > 0:
        scales = logits.new_empty(classes, dtype=torch.float32)
        scale_kernel[(len(offsets) - 1,)](grad_loss, weight_sum, offsets, class_weight, scales, BLOCK_C=COLUMNS)
        grad_kernel[(triton.cdiv(classes, COLUMNS), triton.cdiv(rows, ROWS))](
            *(logits, targets, scales, grad_logits, rows, classes, gamma_positive, gamma_negative, margin),
            **_constants(gamma_positive, gamma_negative, margin),
        )
    return grad_logits


def _constants(gamma_positive: float, gamma_negative: float, margin: float) -> dict[str, int | bool]:
    focused = gamma_positive > 0 or gamma_negative > 0
    return {"FOCUSED": focused, "SHIFTED": margin > 0, "BLOCK_B": ROWS, "BLOCK_C": COLUMNS}


@triton.jit
def _log_of_1_and(z):
    # log(1 + z) times what rounding 1 + z does to z (Goldberg, ACM Computing Surveys 23(1), 1991, theorem 4).
    rounded = 1 + z
    exact = rounded == 1
    return tl.where(exact, z, tl.log(rounded) * z / tl.where(exact, 1.0, rounded - 1))


@triton.jit
def _terms(logit, target, gamma_positive, gamma_negative, margin, FOCUSED: tl.constexpr, SHIFTED: tl.constexpr):
    """The loss of each element and its slope; undefined where the target is unknown."""
    positive = target > 0
    # Having a class is what not having it is at the opposite logit.
    x = tl.where(positive, -logit, logit)
    likely = x >= 0
    small = tl.exp(-tl.abs(x))
    more = _log_of_1_and(small)
    big = 1 / (1 + small)
    p = tl.where(likely, big, small * big)
    other = tl.where(likely, small * big, big)
    loss = tl.where(x < 0, 0.0, x) + more
    slope = p
    if FOCUSED:
        gamma = tl.where(positive, gamma_positive, gamma_negative)
        # An exponent of 0 counts for nothing at infinite logits too.
        focused = gamma > 0
        focus = tl.exp(-tl.where(focused, gamma * (tl.where(likely, 0.0, -x) + more), 0.0))
        slope = focus * (p + tl.where(focused, gamma * other * loss, 0.0))
        loss = focus * loss
    if SHIFTED:
        below = p <= margin
        q = tl.where(below, 0.25, p - margin)
        rest = other + margin
        log_rest = -tl.where(q < 0.5, _log_of_1_and(-q), tl.log(rest))
        shifted = 1 / rest
        focus = 1.0
        if FOCUSED:
            focus = tl.exp(gamma_negative * tl.log(q))
            shifted += gamma_negative * log_rest / q
        loss = tl.where(positive, loss, tl.where(below, 0.0, focus * log_rest))
        slope = tl.where(positive, slope, tl.where(below, 0.0, p * other * focus * shifted))
    slope = tl.where(positive, -slope, slope)
    # A target above 1 must show.
    return tl.where(target > 1, float("nan"), loss), tl.where(target > 1, float("nan"), slope)


@triton.jit
def columns_kernel(
    logits,
    targets,
    class_weight,
    losses,
    weights,
    rows,
    classes,
    gamma_positive,
    gamma_negative,
    margin,
    FOCUSED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = part * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (row < rows)[:, None] & (c < classes)[None, :]
    at = row[:, None] * classes + c[None, :]
    target = tl.load(targets + at, mask=inside, other=-1).to(tl.int32)
    logit = tl.load(logits + at, mask=inside, other=0).to(tl.float32)
    loss, _ = _terms(logit, target, gamma_positive, gamma_negative, margin, FOCUSED, SHIFTED)
    known = target >= 0
    loss = tl.sum(tl.where(known, loss, 0.0), axis=0)
    weight = tl.sum(tl.where(known, 1.0, 0.0), axis=0)
    if class_weight is not None:
        factor = tl.load(class_weight + c, mask=c < classes, other=0).to(tl.float32)
        loss *= factor
        weight *= factor
    tl.store(losses + part * classes + c, loss, mask=c < classes)
    tl.store(weights + part * classes + c, weight, mask=c < classes)


@triton.jit
def loss_kernel(losses, weights, offsets, loss, weight_sum, parts, classes, BLOCK_C: tl.constexpr):
    task = tl.program_id(0)
    first, end = tl.load(offsets + task), tl.load(offsets + task + 1)
    total = tl.full([BLOCK_C], 0.0, tl.float32)
    weight = tl.full([BLOCK_C], 0.0, tl.float32)
    for _ in range(parts):
        for start in range(first, end, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            total += tl.load(losses + c, mask=c < end, other=0)
            weight += tl.load(weights + c, mask=c < end, other=0)
        losses += classes
        weights += classes
    all_weight = tl.sum(weight, axis=0)
    tl.store(loss + task, tl.sum(total, axis=0) * _inverse(all_weight))
    tl.store(weight_sum + task, all_weight)


@triton.jit
def _inverse(weight):
    # A task without known targets costs 0, not 0 / 0.
    return tl.where(weight > 0, 1 / tl.where(weight > 0, weight, 1.0), 0.0)


@triton.jit
def scale_kernel(grad_loss, weight_sum, offsets, class_weight, scales, BLOCK_C: tl.constexpr):
    task = tl.program_id(0)
    first, end = tl.load(offsets + task), tl.load(offsets + task + 1)
    factor = tl.load(grad_loss + task) * _inverse(tl.load(weight_sum + task))
    for start in range(first, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        scale = tl.full([BLOCK_C], 1.0, tl.float32) * factor
        if class_weight is not None:
            scale *= tl.load(class_weight + c, mask=c < end, other=0).to(tl.float32)
        tl.store(scales + c, scale, mask=c < end)


@triton.jit
def grad_kernel(
    logits,
    targets,
    scales,
    grad_logits,
    rows,
    classes,
    gamma_positive,
    gamma_negative,
    margin,
    FOCUSED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (row < rows)[:, None] & (c < classes)[None, :]
    at = row[:, None] * classes + c[None, :]
    target = tl.load(targets + at, mask=inside, other=-1).to(tl.int32)
    logit = tl.load(logits + at, mask=inside, other=0).to(tl.float32)
    _, slope = _terms(logit, target, gamma_positive, gamma_negative, margin, FOCUSED, SHIFTED)
    scale = tl.load(scales + c, mask=c < classes, other=0)
    grad = tl.where(target >= 0, slope, 0.0) * scale[None, :]
    tl.store(grad_logits + at, grad.to(grad_logits.dtype.element_ty), mask=inside)
