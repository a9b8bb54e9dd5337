"""packed_attention on a GPU by PyTorch's own `varlen_attn`, which is FlashAttention."""

from __future__ import annotations

import functools
import importlib.util
import inspect

import torch
from torch import Tensor

MOST_HEAD_SIZE = 256
HEAD_SIZE_STEP = 8
LEAST_CAPABILITY = (8, 0)
_PER_ACCESS = 8  # elements of 16 bits in the 16 bytes that FlashAttention reads at once


@functools.cache
def why_not() -> str | None:
    """None if this PyTorch and the current GPU have what the backend needs, else the reason."""
    module = "torch.nn.attention.varlen"
    if importlib.util.find_spec(module) is None:
        return f"this PyTorch, {torch.__version__}, has no varlen_attn"
    from torch.nn.attention.varlen import varlen_attn

    if not {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"varlen_attn of PyTorch {torch.__version__} takes no scale; install PyTorch 2.11 or later"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without FlashAttention for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0, and this one has {capability[0]}.{capability[1]}"
    return None


def why_not_head_size(size: int) -> str | None:
    """None if FlashAttention takes heads of this size, else the reason."""
    if size % HEAD_SIZE_STEP == 0 and size <= MOST_HEAD_SIZE:
        return None
    return f"it takes head sizes that are multiples of {HEAD_SIZE_STEP}, at most {MOST_HEAD_SIZE}, not {size}"


def forward(
    q: Tensor,  # [Tq, H, E]
    k: Tensor,  # [Tk, H, E]
    v: Tensor,  # [Tk, H, E]
    cu_seqlens_q: Tensor,  # [B + 1] int32
    cu_seqlens_k: Tensor,  # [B + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # [Tq, H, E], [H, Tq]
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if _nothing_to_do(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
        return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    # A window as long as the longest row hides nothing, and keeps newer versions from cuDNN, whose log-sum-exp has
    # another layout.
    window = (-1, 0) if causal else (max_seqlen_k, max_seqlen_k)
    out, lse = varlen_attn(
        _aligned(q),
        _aligned(k),
        _aligned(v),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=window,
    )
    after = _after_last_row(cu_seqlens_q, len(q))
    # FlashAttention writes nothing after the last row, and plus infinity for a query that sees no key.
    lse = lse.masked_fill_((lse == torch.inf) | after, -torch.inf)
    return out.masked_fill_(after[:, None, None], 0), lse


def backward(
    grad_out: Tensor,  # [Tq, H, E]
    grad_lse: Tensor | None,  # always None: packed_attention sends others elsewhere
    q: Tensor,  # [Tq, H, E]
    k: Tensor,  # [Tk, H, E]
    v: Tensor,  # [Tk, H, E]
    out: Tensor,  # [Tq, H, E]
    lse: Tensor,  # [H, Tq]
    cu_seqlens_q: Tensor,  # [B + 1] int32
    cu_seqlens_k: Tensor,  # [B + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [Tq, H, E], [Tk, H, E], [Tk, H, E]
    assert grad_lse is None
    if _nothing_to_do(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    # what `varlen_attn` itself calls in its backward; its autograd would run the forward again
    grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
        *map(_aligned, (grad_out, q, k, v, out)),
        lse.masked_fill(lse == -torch.inf, torch.inf),
        *(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        0.0,  # dropout
        causal,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # the state of dropout's random numbers
        torch.empty(0, device=q.device),
        scale=scale,
        window_size_left=-1,
        window_size_right=0 if causal else -1,
    )
    after_q, after_k = _after_last_row(cu_seqlens_q, len(q)), _after_last_row(cu_seqlens_k, len(k))
    grad_q.masked_fill_(after_q[:, None, None], 0)
    return grad_q, *(grad.masked_fill_(after_k[:, None, None], 0) for grad in (grad_k, grad_v))


def _nothing_to_do(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> bool:
    # FlashAttention would launch kernels of no blocks, which is an error.
    return 0 in (len(q), len(k), q.shape[1], len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k)


def _after_last_row(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens, device=cu_seqlens.device) >= cu_seqlens[-1]  # [T] bool


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where each head begins at a multiple of 16 bytes, else a copy."""
    steps = (tensor.data_ptr() // tensor.element_size(), *tensor.stride()[:-1])
    if all(step % _PER_ACCESS == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
