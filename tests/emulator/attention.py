"""The launcher's part of packed_attention, as `csrc/cuda/packed_attention_launch.h` has it, on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .arrays import Load, ceil_div, ends, nan_like, pointer, to_numpy, to_tensor
from .emulate import ORDERS, Kernels, Report

SIZES = (32, 64, 80, 96, 128)
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
ROWS_PER_WARP, MOST_WARPS = 16, 4


class Strides(ctypes.Structure):
    _fields_ = (("token", ctypes.c_int64), ("head", ctypes.c_int64))


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("rows", "heads", "size", "queries", "keys")),
        ("causal", ctypes.c_bool),
        ("scale", ctypes.c_float),
        *((name, Strides) for name in "qkv"),
    )


def compiled(kernels: Load, dtype: torch.dtype, size: int) -> Kernels:
    return kernels("packed_attention", f"-DELEMENT={ELEMENTS[dtype]}", f"-DSIZE={size}")


# Of each kernel: products of the tiled side's rows with the streamed side's, and sums weighted by them.
PRODUCTS = {"forward": (1, 1), "backward_q": (2, 1), "backward_kv": (2, 2)}


def most_grad_warps(element_bytes: int, size: int) -> int:
    return 2 if element_bytes == 4 and size > 64 else MOST_WARPS


def depth_of(dtype: torch.dtype) -> int:
    """Columns of the left operand that a tensor-core instruction takes."""
    return 8 if dtype == torch.float32 else 16


def seen(kernel: str, queries: int, keys: int, causal: bool) -> list[int]:
    """Of each token on the kernel's tiled side, how many of the other side it meets."""
    keys_of = [max(0, min(keys, query + 1 + keys - queries)) if causal else keys for query in range(queries)]
    return [sum(key < n for n in keys_of) for key in range(keys)] if kernel == "backward_kv" else keys_of


def fewest_instructions(
    kernel: str, dtype: torch.dtype, queries: int, keys: int, size: int = 64, causal: bool = False
) -> tuple[float, int]:
    """A row's tensor-core instructions: what the arithmetic fills, and what whole instructions allow.

    A whole instruction takes 16 rows, 8 columns and the depth of its dtype.
    """
    # Floats take six instructions for the scores and three for every other product.
    score_cost, cost = (6, 3) if dtype == torch.float32 else (1, 1)
    products, sums = PRODUCTS[kernel]
    product_cost, depth = score_cost + (products - 1) * cost, depth_of(dtype)
    others = seen(kernel, queries, keys, causal)
    arithmetic = (product_cost + sums * cost) * sum(others) * size / (ROWS_PER_WARP * 8 * depth)
    whole = 0
    for first in range(0, len(others), ROWS_PER_WARP):
        most = max(others[first : first + ROWS_PER_WARP])
        whole += product_cost * ceil_div(most, 8) * ceil_div(size, depth)
        whole += sums * cost * ceil_div(most, depth) * ceil_div(size, 8)
    return arithmetic, whole


class Attention:
    """One call of the operator; `qkv` may be views into one array `[T, 3, H, E]`."""

    def __init__(
        self,
        kernels: Load,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int],
        causal: bool = False,
        scale: float | None = None,
        orders: Sequence[tuple[str, int]] = ORDERS,
    ) -> None:
        self.dtype, self.orders = q.dtype, orders
        self.tokens_q, self.heads, self.size = q.shape
        self.tokens_k = len(k)
        self.longest_q, self.longest_k = max(q_lengths, default=0), max(k_lengths, default=0)
        self.causal, self.scale = causal, self.size**-0.5 if scale is None else scale
        self.rows = len(q_lengths)
        self.ends_q, self.ends_k = ends(q_lengths).numpy(), ends(k_lengths).numpy()
        size = next(size for size in SIZES if size >= self.size)
        self.compiled = compiled(kernels, self.dtype, size)
        self.given = {name: pointer(name, tensor) for name, tensor in (("q", q), ("k", k), ("v", v))}
        strides = [Strides(tensor.stride(0), tensor.stride(1)) for tensor in (q, k, v)]
        sizes = (self.rows, self.heads, self.size, self.tokens_q, self.tokens_k)
        self.shape = bytes(Shape(*sizes, causal, self.scale, *strides))
        self.reports: dict[str, Report] = {}

    def _launch(self, kernel: str, grid, threads: int, arguments: list, shared: int = 0) -> None:
        shape = [] if kernel == "plan" else [self.shape]
        report = self.compiled.launch_in_orders(
            kernel, grid, threads, [*shape, *arguments], dynamic_shared=shared, orders=self.orders
        )
        self.reports[kernel] = report.check()

    def plan(self, tokens: int, warps: int, tiled: np.ndarray, other: np.ndarray) -> np.ndarray:
        limit = self.compiled.call("most_items", tokens, self.rows, warps * ROWS_PER_WARP)
        items = np.full((limit, 2), -7, np.int32)
        # The kernel takes pairs of integers, 8 bytes an element.
        pairs = items.view(np.int64)
        self._launch("plan", 1, 32, [self.rows, tokens, warps * ROWS_PER_WARP, limit, tiled, other, pairs])
        return pairs

    def forward(self) -> tuple[Tensor, Tensor]:
        out = nan_like((self.tokens_q, self.heads, self.size), self.dtype)
        lse = nan_like((self.heads, self.tokens_q), torch.float32)
        warps = self.compiled.call("warps_for", self.longest_q, MOST_WARPS)
        items = self.plan(self.tokens_q, warps, self.ends_q, self.ends_k)
        shared = self.compiled.call("forward_bytes", warps)
        arguments = [items, self.ends_q, self.ends_k, *self.given.values(), out, lse]
        self._launch("forward", (len(items), self.heads), 32 * warps, arguments, shared)
        return to_tensor(out, self.dtype), torch.from_numpy(lse)

    def delta(self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
        delta = nan_like((self.heads, self.tokens_q), torch.float32)
        grid = (ceil_div(self.tokens_q * 8 * grad_out.element_size(), 128), self.heads)
        arguments = [to_numpy(out), to_numpy(grad_out), None if grad_lse is None else to_numpy(grad_lse), delta]
        self._launch("backward_delta", grid, 128, arguments)
        return torch.from_numpy(delta)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, given_lse = to_numpy(grad_out), to_numpy(lse)
        delta = self.delta(grad_out, grad_lse, out).numpy()
        most = most_grad_warps(grad_out.element_size(), self.size)
        grads = [
            nan_like((tokens, self.heads, self.size), self.dtype) for tokens in (self.tokens_q, *2 * (self.tokens_k,))
        ]
        common = [self.ends_q, self.ends_k, *self.given.values(), grad, given_lse, delta]
        for kernel, tokens, longest, tiled, other, results in (
            ("backward_q", self.tokens_q, self.longest_q, self.ends_q, self.ends_k, [grads[0], None]),
            ("backward_kv", self.tokens_k, self.longest_k, self.ends_k, self.ends_q, grads[1:]),
        ):
            warps = self.compiled.call("warps_for", longest, most)
            items = self.plan(tokens, warps, tiled, other)
            shared = self.compiled.call("backward_bytes", warps)
            self._launch(
                kernel,
                (len(items), self.heads),
                32 * warps,
                [items, *common, *results],
                shared,
            )
        return tuple(to_tensor(x, self.dtype) for x in grads)  # type: ignore[return-value]
