"""packed_attention in Triton: online softmax over blocks of a row's keys, and a backward without atomics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Below every score but finite, so that a maximum that has seen no key can still be subtracted from minus infinity.
LOWEST = tl.constexpr(-1e38)

Blocks = tuple[int, int, int, int]  # BLOCK_Q, BLOCK_K, num_warps, num_stages

# By the greatest head size, then whether float32; small blocks first. All hold without spills and within 99 KiB of
# shared memory on sm_80, sm_90 and sm_100 up to a head size of 128; beyond, float32's gradient of q spills. Products
# of float32 stay off the tensor cores, to be exact, and take their operands from registers.
FORWARD_BLOCKS: dict[float, dict[bool, list[Blocks]]] = {
    64: {
        False: [(16, 32, 2, 2), (16, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
        True: [(16, 16, 4, 1), (16, 32, 8, 1), (32, 16, 4, 1)],
    },
    128: {False: [(16, 32, 2, 2), (16, 64, 4, 2), (64, 64, 8, 1)], True: [(16, 16, 8, 1)]},
    math.inf: {False: [(16, 16, 4, 1)], True: [(16, 16, 8, 1)]},
}
GRAD_Q_BLOCKS: dict[float, dict[bool, list[Blocks]]] = {
    64: {
        False: [(16, 32, 2, 2), (16, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
        True: [(16, 16, 4, 1), (16, 32, 4, 1), (32, 32, 8, 1)],
    },
    128: {False: [(16, 32, 2, 2), (16, 64, 4, 2), (64, 32, 4, 2)], True: [(16, 16, 8, 1)]},
    math.inf: {False: [(16, 16, 4, 1)], True: [(16, 16, 8, 1)]},
}
GRAD_KV_BLOCKS: dict[float, dict[bool, list[Blocks]]] = {
    64: {
        False: [(16, 32, 2, 2), (16, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)],
        True: [(16, 16, 4, 1), (32, 32, 8, 1)],
    },
    128: {False: [(16, 32, 4, 2), (16, 64, 8, 2), (32, 64, 8, 2)], True: [(32, 32, 8, 1)]},
    math.inf: {False: [(16, 16, 4, 1)], True: [(16, 16, 8, 1)]},
}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """`q [Tq, H, E]`, `k` and `v [Tk, H, E]` -> out `[Tq, H, E]`, log-sum-exp `[H, Tq]` float32."""
    tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    if out.numel() > 0:
        forward_kernel[_grid(cu_seqlens_q, heads, max_seqlen_q, "BLOCK_Q")](
            *(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
            *(len(cu_seqlens_q) - 1, tokens, *_classes(max_seqlen_q, max_seqlen_k), scale),
            **_constants(q, causal),
        )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; a program owns a block of one of them and sums in a fixed order."""
    (tokens_q, heads, _), tokens_k = q.shape, len(k)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    ends = (cu_seqlens_q, cu_seqlens_k)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    rows, classes = len(cu_seqlens_q) - 1, _classes(max_seqlen_q, max_seqlen_k)
    constants = _constants(q, causal)
    if grad_q.numel() > 0:
        grad_q_kernel[_grid(cu_seqlens_q, heads, max_seqlen_q, "BLOCK_Q")](
            *(grad_out, grad_lse, q, k, v, out, lse, delta, grad_q, *ends, *strides),
            *(rows, tokens_q, *classes, scale),
            **constants,
        )
    if grad_k.numel() > 0:
        grad_kv_kernel[_grid(cu_seqlens_k, heads, max_seqlen_k, "BLOCK_K")](
            *(grad_out, q, k, v, lse, delta, grad_k, grad_v, *ends, *strides),
            *(rows, tokens_q, tokens_k, *classes, scale),
            **constants,
        )
    return grad_q, grad_k, grad_v


def _grid(cu_seqlens: Tensor, heads: int, longest: int, block: str) -> Callable[[dict[str, Any]], tuple[int, int, int]]:
    # Blocks vary slowest, so that rows too short for a block free their place at once. One row more than there are
    # clears what follows the last.
    return lambda meta: (len(cu_seqlens), heads, max(triton.cdiv(longest, meta[block]), 1))


def _constants(q: Tensor, causal: bool) -> dict[str, Any]:
    size = q.shape[2]
    return {"SIZE": size, "BLOCK_E": max(triton.next_power_of_2(size), 16), "CAUSAL": causal}


def _classes(*longest: int) -> list[int]:
    """Row lengths rounded up to 16, 64, 256 or 1024: configurations are tuned once for each of these."""
    return [next(bound for bound in (16, 64, 256, 1024) if length <= bound or bound == 1024) for length in longest]


def selectable(
    blocks: dict[float, dict[bool, list[Blocks]]], block_e: int, dtype: torch.dtype, longest_q: int, longest_k: int
) -> list[Blocks]:
    """The configurations to time for a head size, a dtype and a class of row lengths: no block exceeds the rows."""
    listed = blocks[next(bound for bound in blocks if block_e <= bound)][dtype == torch.float32]
    return [config for config in listed if config[0] <= longest_q and config[1] <= longest_k] or listed[:1]


def _tuned(blocks: dict[float, dict[bool, list[Blocks]]]) -> Callable[[Any], Any]:
    """Time the selectable configurations at the first call of each class of shapes; the choice is kept on disk."""
    listed = {config for by_dtype in blocks.values() for configs in by_dtype.values() for config in configs}
    configs = {
        (block_q, block_k, warps, stages): triton.Config({"BLOCK_Q": block_q, "BLOCK_K": block_k}, warps, stages)
        for block_q, block_k, warps, stages in sorted(listed)
    }

    def prune(_: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        longest = arguments["longest_q"], arguments["longest_k"]
        chosen = selectable(blocks, constants["BLOCK_E"], arguments["q"].dtype, *longest)
        # The interpreter has no clock, and runs few large blocks faster.
        return [configs[config] for config in (chosen[-1:] if triton.knobs.runtime.interpret else chosen)]

    return triton.autotune(
        list(configs.values()),
        key=["SIZE", "CAUSAL", "longest_q", "longest_k"],
        prune_configs_by={"early_config_prune": prune},
        # Triton up to 3.7 times a single configuration too.
        do_bench=(lambda call, quantiles: [0.0]) if triton.knobs.runtime.interpret else None,
        cache_results=True,
    )


@_tuned(FORWARD_BLOCKS)
@triton.jit(do_not_specialize=["longest_q", "longest_k"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    rows,
    tokens,
    longest_q,
    longest_k,
    scale,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    d = tl.arange(0, BLOCK_E)
    d_in = d[None, :] < SIZE
    q_start = tl.load(cu_seqlens_q + row)
    i = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if row == rows:
        for start in range(q_start, tokens, tl.num_programs(2) * BLOCK_Q):
            t = (start + i).to(tl.int64)
            at = out + (t[:, None] * heads + head) * SIZE + d[None, :]
            tl.store(at, tl.full([BLOCK_Q, BLOCK_E], 0, out.dtype.element_ty), mask=(t < tokens)[:, None] & d_in)
            tl.store(lse + head * tokens + t, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=t < tokens)
        return
    k_start = tl.load(cu_seqlens_k + row)
    n, m = tl.load(cu_seqlens_q + row + 1) - q_start, tl.load(cu_seqlens_k + row + 1) - k_start
    if tl.program_id(2) * BLOCK_Q >= n:
        return

    tq, i_in = q_start.to(tl.int64) + i, i < n
    queries = tl.load(q + tq[:, None] * q_token + head * q_head + d[None, :], mask=i_in[:, None] & d_in, other=0)
    most = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    sums = tl.full([BLOCK_Q, BLOCK_E], 0.0, tl.float32)
    seen = tl.minimum(m, (tl.program_id(2) + 1) * BLOCK_Q + m - n) if CAUSAL else m
    for start in range(0, seen, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        tk, j_in = k_start.to(tl.int64) + j, j < m
        keys = tl.load(k + tk[:, None] * k_token + head * k_head + d[None, :], mask=j_in[:, None] & d_in, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        sees = j_in[None, :]
        if CAUSAL:
            sees = sees & (j[None, :] <= i[:, None] + (m - n))
        scores = tl.where(sees, scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, axis=1))
        powers = tl.exp(scores - larger[:, None])
        shrink = tl.exp(most - larger)
        total = total * shrink + tl.sum(powers, axis=1)
        values = tl.load(v + tk[:, None] * v_token + head * v_head + d[None, :], mask=j_in[:, None] & d_in, other=0)
        sums = tl.dot(powers.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        most = larger

    blind = total == 0  # of no key
    total = tl.where(blind, 1.0, total)
    at = out + (tq[:, None] * heads + head) * SIZE + d[None, :]
    tl.store(at, (sums / total[:, None]).to(out.dtype.element_ty), mask=i_in[:, None] & d_in)
    level = tl.where(blind, float("-inf"), most + tl.log(total))
    tl.store(lse + head * tokens + tq, level, mask=i_in)


@_tuned(GRAD_Q_BLOCKS)
@triton.jit(do_not_specialize=["longest_q", "longest_k"])
def grad_q_kernel(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    delta,
    grad_q,
    cu_seqlens_q,
    cu_seqlens_k,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    rows,
    tokens,
    longest_q,
    longest_k,
    scale,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    d = tl.arange(0, BLOCK_E)
    d_in = d[None, :] < SIZE
    q_start = tl.load(cu_seqlens_q + row)
    i = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if row == rows:
        for start in range(q_start, tokens, tl.num_programs(2) * BLOCK_Q):
            t = (start + i).to(tl.int64)
            at = grad_q + (t[:, None] * heads + head) * SIZE + d[None, :]
            tl.store(at, tl.full([BLOCK_Q, BLOCK_E], 0, grad_q.dtype.element_ty), mask=(t < tokens)[:, None] & d_in)
        return
    k_start = tl.load(cu_seqlens_k + row)
    n, m = tl.load(cu_seqlens_q + row + 1) - q_start, tl.load(cu_seqlens_k + row + 1) - k_start
    if tl.program_id(2) * BLOCK_Q >= n:
        return

    tq, i_in = q_start.to(tl.int64) + i, i < n
    inside = i_in[:, None] & d_in
    at = (tq[:, None] * heads + head) * SIZE + d[None, :]
    grads = tl.load(grad_out + at, mask=inside, other=0)
    slope = tl.sum(grads.to(tl.float32) * tl.load(out + at, mask=inside, other=0).to(tl.float32), axis=1)
    if grad_lse is not None:
        slope -= tl.load(grad_lse + head * tokens + tq, mask=i_in, other=0)
    tl.store(delta + head * tokens + tq, slope, mask=i_in)  # for grad_kv_kernel, which runs next

    queries = tl.load(q + tq[:, None] * q_token + head * q_head + d[None, :], mask=inside, other=0)
    level = tl.load(lse + head * tokens + tq, mask=i_in, other=0)
    sums = tl.full([BLOCK_Q, BLOCK_E], 0.0, tl.float32)
    seen = tl.minimum(m, (tl.program_id(2) + 1) * BLOCK_Q + m - n) if CAUSAL else m
    for start in range(0, seen, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        tk, j_in = k_start.to(tl.int64) + j, j < m
        keys = tl.load(k + tk[:, None] * k_token + head * k_head + d[None, :], mask=j_in[:, None] & d_in, other=0)
        values = tl.load(v + tk[:, None] * v_token + head * v_head + d[None, :], mask=j_in[:, None] & d_in, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        sees = j_in[None, :]
        if CAUSAL:
            sees = sees & (j[None, :] <= i[:, None] + (m - n))
        share = tl.where(sees, tl.exp(scores - level[:, None]), 0.0)
        grad_share = tl.dot(grads, tl.trans(values), input_precision="ieee")
        grad_scores = share * (grad_share - slope[:, None])
        sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision="ieee")

    tl.store(grad_q + at, (sums * scale).to(grad_q.dtype.element_ty), mask=inside)


@_tuned(GRAD_KV_BLOCKS)
@triton.jit(do_not_specialize=["longest_q", "longest_k"])
def grad_kv_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    grad_k,
    grad_v,
    cu_seqlens_q,
    cu_seqlens_k,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    rows,
    tokens_q,
    tokens_k,
    longest_q,
    longest_k,
    scale,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    d = tl.arange(0, BLOCK_E)
    d_in = d[None, :] < SIZE
    k_start = tl.load(cu_seqlens_k + row)
    j = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = grad_k.dtype.element_ty
    if row == rows:
        for start in range(k_start, tokens_k, tl.num_programs(2) * BLOCK_K):
            t = (start + j).to(tl.int64)
            at, inside = (t[:, None] * heads + head) * SIZE + d[None, :], (t < tokens_k)[:, None] & d_in
            tl.store(grad_k + at, tl.full([BLOCK_K, BLOCK_E], 0, dtype), mask=inside)
            tl.store(grad_v + at, tl.full([BLOCK_K, BLOCK_E], 0, dtype), mask=inside)
        return
    q_start = tl.load(cu_seqlens_q + row)
    n, m = tl.load(cu_seqlens_q + row + 1) - q_start, tl.load(cu_seqlens_k + row + 1) - k_start
    if tl.program_id(2) * BLOCK_K >= m:
        return

    tk, j_in = k_start.to(tl.int64) + j, j < m
    inside = j_in[:, None] & d_in
    keys = tl.load(k + tk[:, None] * k_token + head * k_head + d[None, :], mask=inside, other=0)
    values = tl.load(v + tk[:, None] * v_token + head * v_head + d[None, :], mask=inside, other=0)
    sums_k = tl.full([BLOCK_K, BLOCK_E], 0.0, tl.float32)
    sums_v = tl.full([BLOCK_K, BLOCK_E], 0.0, tl.float32)
    first = tl.maximum(tl.program_id(2) * BLOCK_K - (m - n), 0) if CAUSAL else 0
    for start in range(first, n, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        tq, i_in = q_start.to(tl.int64) + i, i < n
        q_in = i_in[:, None] & d_in
        queries = tl.load(q + tq[:, None] * q_token + head * q_head + d[None, :], mask=q_in, other=0)
        grads = tl.load(grad_out + (tq[:, None] * heads + head) * SIZE + d[None, :], mask=q_in, other=0)
        level = tl.load(lse + head * tokens_q + tq, mask=i_in, other=0)
        slope = tl.load(delta + head * tokens_q + tq, mask=i_in, other=0)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale  # [BLOCK_K, BLOCK_Q]
        sees = i_in[None, :]
        if CAUSAL:
            sees = sees & (j[:, None] <= i[None, :] + (m - n))
        share = tl.where(sees, tl.exp(scores - level[None, :]), 0.0)
        sums_v = tl.dot(share.to(grads.dtype), grads, sums_v, input_precision="ieee")
        grad_share = tl.dot(values, tl.trans(grads), input_precision="ieee")
        grad_scores = share * (grad_share - slope[None, :])
        sums_k = tl.dot(grad_scores.to(queries.dtype), queries, sums_k, input_precision="ieee")

    at = (tk[:, None] * heads + head) * SIZE + d[None, :]
    tl.store(grad_k + at, (sums_k * scale).to(dtype), mask=inside)
    tl.store(grad_v + at, sums_v.to(dtype), mask=inside)
