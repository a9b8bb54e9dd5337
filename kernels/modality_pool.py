"""modality_pool in Triton: scores, softmax and weighted sum of a row's modalities, for a block of tasks at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TASK_BLOCK = 4
WEIGHT_TASK_BLOCK = 4
WEIGHT_ROW_BLOCK = 16


def forward(embeddings: Tensor, weight: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """`embeddings [B, M, D]`, `weight [K, M or 1, D]`, `present [B, M]` -> pooled `[B, K, D]`, weights `[B, K, M]`."""
    rows, modalities, width = embeddings.shape
    tasks = len(weight)
    pooled = embeddings.new_empty(rows, tasks, width)
    weights = embeddings.new_empty(rows, tasks, modalities, dtype=torch.float32)
    if weights.numel() > 0:
        grid = (rows, triton.cdiv(tasks, TASK_BLOCK))
        forward_kernel[grid](
            *(embeddings, weight, present, pooled, weights),
            *(tasks, width, modalities, weight.shape[1] == 1),
            **_blocks(modalities, width),
        )
    return pooled, weights


def backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    embeddings: Tensor,
    weight: Tensor,
    present: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients `[B, M, D]` of the embeddings and `[K, M or 1, D]` of the weight; every sum has a fixed order."""
    rows, modalities, width = embeddings.shape
    tasks, shared = len(weight), weight.shape[1] == 1
    grad_embeddings, grad_weight = torch.empty_like(embeddings), torch.empty_like(weight)
    grad_scores = torch.empty_like(weights)
    blocks = _blocks(modalities, width)
    sizes = (tasks, width, modalities)
    if weights.numel() > 0:
        scores_kernel[(rows, triton.cdiv(tasks, TASK_BLOCK))](
            *(grad_pooled, grad_weights, embeddings, present, weights, grad_scores), *sizes, **blocks
        )
    if embeddings.numel() > 0:
        embeddings_kernel[(rows, triton.cdiv(width, blocks["BLOCK_D"]))](
            *(grad_pooled, weight, present, weights, grad_scores, grad_embeddings), *sizes, shared, **blocks
        )
    if weight.numel() > 0:
        grid = (triton.cdiv(width, 64), triton.cdiv(tasks, WEIGHT_TASK_BLOCK), 1 if shared else modalities)
        weight_kernel[grid](
            *(embeddings, present, grad_scores, grad_weight),
            *(rows, *sizes, shared, WEIGHT_ROW_BLOCK, WEIGHT_TASK_BLOCK, 64),
        )
    return grad_embeddings, grad_weight


def _blocks(modalities: int, width: int) -> dict[str, int]:
    block_m = triton.next_power_of_2(modalities)
    # A program holds TASK_BLOCK * BLOCK_M * BLOCK_D elements in registers.
    block_d = min(max(triton.next_power_of_2(width), 16), 512 // block_m)
    return {"BLOCK_K": TASK_BLOCK, "BLOCK_M": block_m, "BLOCK_D": block_d}


@triton.jit
def forward_kernel(
    embeddings,
    weight,
    present,
    pooled,
    weights,
    tasks,
    width,
    MODALITIES: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    k_in, m_in = k < tasks, m < MODALITIES
    exists = tl.load(present + row * MODALITIES + m, mask=m_in, other=0) != 0
    embedding = embeddings + (row * MODALITIES + m)[:, None] * width
    vector = k.to(tl.int64)[:, None] + 0 * m[None, :] if SHARED else k.to(tl.int64)[:, None] * MODALITIES + m[None, :]

    scores = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_in = d < width
        e = tl.load(embedding + d[None, :], mask=exists[:, None] & d_in[None, :], other=0).to(tl.float32)
        w_in = k_in[:, None, None] & exists[None, :, None] & d_in[None, None, :]
        w = tl.load(weight + vector[:, :, None] * width + d[None, None, :], mask=w_in, other=0).to(tl.float32)
        scores += tl.sum(w * e[None, :, :], axis=2)

    scores = tl.where(exists[None, :], scores, float("-inf"))
    # In a row without modalities the weights are 0, not 0 / 0.
    most = tl.max(scores, axis=1)
    most = tl.where(most == float("-inf"), 0.0, most)
    powers = tl.where(exists[None, :], tl.exp(scores - most[:, None]), 0.0)
    total = tl.sum(powers, axis=1)
    share = powers / tl.where(total == 0.0, 1.0, total)[:, None]
    at = (row * tasks + k)[:, None] * MODALITIES + m[None, :]
    tl.store(weights + at, share, mask=k_in[:, None] & m_in[None, :])

    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_in = d < width
        e = tl.load(embedding + d[None, :], mask=exists[:, None] & d_in[None, :], other=0).to(tl.float32)
        mean = tl.sum(share[:, :, None] * e[None, :, :], axis=1)
        out = pooled + (row * tasks + k)[:, None] * width + d[None, :]
        tl.store(out, mean.to(pooled.dtype.element_ty), mask=k_in[:, None] & d_in[None, :])


@triton.jit
def scores_kernel(
    grad_pooled,
    grad_weights,
    embeddings,
    present,
    weights,
    grad_scores,
    tasks,
    width,
    MODALITIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    k_in, m_in = k < tasks, m < MODALITIES
    exists = tl.load(present + row * MODALITIES + m, mask=m_in, other=0) != 0
    embedding = embeddings + (row * MODALITIES + m)[:, None] * width
    grad_row = grad_pooled + (row * tasks + k)[:, None] * width

    product = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_in = d < width
        e = tl.load(embedding + d[None, :], mask=exists[:, None] & d_in[None, :], other=0).to(tl.float32)
        grad = tl.load(grad_row + d[None, :], mask=k_in[:, None] & d_in[None, :], other=0).to(tl.float32)
        product += tl.sum(grad[:, None, :] * e[None, :, :], axis=2)

    at = (row * tasks + k)[:, None] * MODALITIES + m[None, :]
    inside = k_in[:, None] & m_in[None, :]
    share = tl.load(weights + at, mask=inside, other=0)
    if grad_weights is not None:
        product += tl.load(grad_weights + at, mask=inside, other=0)
    mean = tl.sum(share * product, axis=1)
    tl.store(grad_scores + at, share * (product - mean[:, None]), mask=inside)


@triton.jit
def embeddings_kernel(
    grad_pooled,
    weight,
    present,
    weights,
    grad_scores,
    grad_embeddings,
    tasks,
    width,
    MODALITIES: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    d_in, m_in = d < width, m < MODALITIES
    exists = tl.load(present + row * MODALITIES + m, mask=m_in, other=0) != 0

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tasks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < tasks
        grad_at = (row * tasks + k)[:, None] * width + d[None, :]
        grad = tl.load(grad_pooled + grad_at, mask=k_in[:, None] & d_in[None, :], other=0).to(tl.float32)
        at = (row * tasks + k)[:, None] * MODALITIES + m[None, :]
        inside = k_in[:, None] & exists[None, :]
        share = tl.load(weights + at, mask=inside, other=0)
        slope = tl.load(grad_scores + at, mask=inside, other=0)
        vector = (
            k.to(tl.int64)[:, None] + 0 * m[None, :] if SHARED else k.to(tl.int64)[:, None] * MODALITIES + m[None, :]
        )
        w_at = vector[:, :, None] * width + d[None, None, :]
        w = tl.load(weight + w_at, mask=inside[:, :, None] & d_in[None, None, :], other=0).to(tl.float32)
        total += tl.sum(share[:, :, None] * grad[:, None, :] + slope[:, :, None] * w, axis=0)

    out = grad_embeddings + (row * MODALITIES + m)[:, None] * width + d[None, :]
    tl.store(out, total.to(grad_embeddings.dtype.element_ty), mask=m_in[:, None] & d_in[None, :])


@triton.jit
def weight_kernel(
    embeddings,
    present,
    grad_scores,
    grad_weight,
    rows,
    tasks,
    width,
    MODALITIES: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    d_in, k_in = d < width, k < tasks

    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, rows, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        for modality in tl.static_range(MODALITIES if SHARED else 1):
            m = modality if SHARED else tl.program_id(2)
            exists = tl.load(present + b * MODALITIES + m, mask=b < rows, other=0) != 0
            e_at = (b * MODALITIES + m)[:, None] * width + d[None, :]
            e = tl.load(embeddings + e_at, mask=exists[:, None] & d_in[None, :], other=0).to(tl.float32)
            slope_at = (b[:, None] * tasks + k[None, :]) * MODALITIES + m
            slope = tl.load(grad_scores + slope_at, mask=exists[:, None] & k_in[None, :], other=0)
            total += tl.sum(slope[:, :, None] * e[:, None, :], axis=0)

    vector = k.to(tl.int64) if SHARED else k.to(tl.int64) * MODALITIES + tl.program_id(2)
    out = grad_weight + vector[:, None] * width + d[None, :]
    tl.store(out, total.to(grad_weight.dtype.element_ty), mask=k_in[:, None] & d_in[None, :])
