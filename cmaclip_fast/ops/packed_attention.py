"""Attention within each row of a packed batch, without padding (paper, figure 1, sequence-wise attention)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, library

from cmaclip_fast.ops import autocast, checks, derivatives, dispatch, preferences, reference, varlen

# The largest that csrc/cuda/packed_attention_launch.h compiles.
CUDA_HEAD_SIZE = 128


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention of each row's queries over the same row's keys.

    Row b has the queries `cu_seqlens_q[b]:cu_seqlens_q[b + 1]` and the keys `cu_seqlens_k[b]:cu_seqlens_k[b + 1]`;
    both may be empty. A query that sees no key, and tokens past the last row, give 0.

    Args:
        q: `[Tq, H, E]` float; may be a strided view, contiguous in its last dimension, as k and v.
        k: `[Tk, H, E]`, same dtype.
        v: `[Tk, H, E]`, same dtype.
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin, from 0, and the last one's end.
        cu_seqlens_k: `[B + 1]` int32, the same of the keys.
        max_seqlen_q: at least the longest row's number of queries.
        max_seqlen_k: at least the longest row's number of keys.
        scale: factor of the scores; `E ** -0.5` if None.
        causal: a query sees no later keys; a row's last query is aligned with its last key.
        backend: overrides `use_backend` and `CMACLIP_BACKEND`.

    Returns:
        out `[Tq, H, E]` in the dtype of `q`, and the log-sum-exp of the scaled scores `[H, Tq]` in float32 (float64 for
        float64), minus infinity for a query that sees no key.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device, or strides, or `cu_seqlens` that decrease
            or overrun (checked on the CPU; on a GPU if CMACLIP_DEBUG=1).
        RuntimeError: the backend asked for cannot run; `torch` says so in the backward too, where the log-sum-exp has a
            gradient.
    """
    if dispatch.straight_to_cpp(backend, q, k, v, cu_seqlens_q, cu_seqlens_k) and q.ndim == 3:
        run = torch.ops.cmaclip._packed_attention_forward_cpp.default
        factor = max(1, q.shape[-1]) ** -0.5 if scale is None else scale
        try:
            return run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, factor, causal)
        except (RuntimeError, TypeError):
            # names the argument at fault, if it is one
            _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
            _check_ends(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            raise
    q, k, v = autocast.to_low_precision(q, k, v)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if scale is None:
        scale = q.shape[2] ** -0.5
    call, backend = derivatives.entry("packed_attention", _forward, backend, q, k, v)
    return call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, backend)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    arguments = checks.Arguments("q", q.device)
    arguments.check("q", q, "Tq, H, E", checks.FLOATS)
    for name, tensor in (("k", k), ("v", v)):
        arguments.check(name, tensor, "Tk, H, E", (q.dtype,), like="q")
    arguments.check("cu_seqlens_q", cu_seqlens_q, "B+1", (torch.int32,))
    arguments.check("cu_seqlens_k", cu_seqlens_k, "B+1", (torch.int32,))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.last_contiguous(name, tensor)
    if q.shape[2] == 0 or cu_seqlens_q.shape[0] == 0:
        raise ValueError("q must have a head size of at least 1, and cu_seqlens_q at least one element")


def _check_ends(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, len(q), max_seqlen_q)
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, len(k), max_seqlen_k)


library.define(
    "cmaclip::packed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " float scale, bool causal, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "cmaclip::packed_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_ends(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.not_nan(q=q, k=k, v=v)
    shape = preferences.shape_class(q.shape[2], max_seqlen_q, max_seqlen_k)
    run = dispatch.implementation("packed_attention", "forward", backend, q, _cannot(q), shape)
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal)


library.impl("cmaclip::packed_attention", "default", _forward)


@library.impl("cmaclip::packed_attention_backward", "default")
def _backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    cannot = _cannot(q)
    if grad_lse is not None:
        cannot = (*cannot, ("torch", "its backward takes no gradient of the log-sum-exp"))
    shape = preferences.shape_class(q.shape[2], max_seqlen_q, max_seqlen_k)
    run = dispatch.implementation("packed_attention", "backward", backend, q, cannot, shape)
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    return run(
        grad_out.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        q,
        k,
        v,
        out.contiguous(),
        lse.contiguous(),
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
    )


@library.register_fake("cmaclip::packed_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=reference.wide(q.dtype))


@library.register_fake("cmaclip::packed_attention_backward")
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if grad_out is None:
        if grad_lse is None:
            return (None,) * 10
        grad_out = torch.zeros_like(out)
    grads = torch.ops.cmaclip.packed_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return (*grads, *(None,) * 7)


library.register_autograd("cmaclip::packed_attention", _autograd, setup_context=_setup_context)
derivatives.register_second("packed_attention", reference.packed_attention_backward)


@functools.cache
def _head_size_reasons(size: int) -> tuple[tuple[str, str], ...]:
    reasons = {"torch": varlen.why_not_head_size(size)}
    if size > CUDA_HEAD_SIZE:
        reasons["cuda"] = f"it takes head sizes of at most {CUDA_HEAD_SIZE}, not {size}"
    return tuple((backend, reason) for backend, reason in reasons.items() if reason is not None)


def _cannot(q: Tensor) -> tuple[tuple[str, str], ...]:
    return _head_size_reasons(q.shape[2])


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
