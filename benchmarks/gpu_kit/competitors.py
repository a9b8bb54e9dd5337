"""packed_attention's inputs at the model's shapes, and the ways to compute it that are timed side by side."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operators import padded
from cmaclip_fast.ops import packed_attention

SHORTEST, LONGEST = 5, 127
HEADS = 8


@dataclass(frozen=True)
class Shape:
    """Rows of 5 to 127 tokens; `queries` of each row are its first few, or all where it is None."""

    batch: int
    mean: int
    size: int
    queries: int | None = None
    heads: int = HEADS

    def __str__(self) -> str:
        queries = "all queries" if self.queries is None else f"{self.queries} queries a row"
        return f"{self.batch} rows of {self.mean} tokens, head size {self.size}, {queries}"

    @functools.cached_property
    def key_lengths(self) -> list[int]:
        """Quantiles of a power law with the mean that is asked for, in random order."""
        power = (LONGEST - SHORTEST) / (self.mean - SHORTEST) - 1
        quantiles = (torch.arange(self.batch) + 0.5) / self.batch
        drawn = SHORTEST + (LONGEST - SHORTEST) * quantiles**power
        order = torch.randperm(self.batch, generator=torch.Generator().manual_seed(self.batch))
        return [round(float(length)) for length in drawn[order]]

    @property
    def query_lengths(self) -> list[int]:
        return self.key_lengths if self.queries is None else [self.queries] * self.batch

    def operations(self, backward: bool) -> float:
        """Of the two products of the forward; with the backward, of seven."""
        scores = sum(n * m for n, m in zip(self.query_lengths, self.key_lengths, strict=True))
        return (14 if backward else 4) * scores * self.heads * self.size

    def bytes(self, element: int, backward: bool) -> int:
        """That must be moved: each input read and each output written once, in the backward as in the forward."""
        token = self.heads * self.size * element
        q, k = sum(self.query_lengths) * token, sum(self.key_lengths) * token
        forward = 2 * q + 2 * k
        return forward + (4 * q + 4 * k if backward else 0)  # q, out, their gradients; k, v, their gradients


def shapes(batches: tuple[int, ...] = (256, 1024, 32)) -> Iterator[Shape]:
    """The model's own head size first."""
    for size, mean, queries, batch in itertools.product((64, 80), (70, 20), (None, 2), batches):
        yield Shape(batch, mean, size, queries)


class Inputs:
    """One set of random inputs; `q`, `k` and `v` want gradients."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape = shape
        n, m = shape.query_lengths, shape.key_lengths
        draw = functools.partial(torch.randn, dtype=dtype, device=device)
        self.q, self.grad = (draw(sum(n), shape.heads, shape.size) for _ in range(2))
        self.k, self.v = (draw(sum(m), shape.heads, shape.size) for _ in range(2))
        self.ends_q, self.ends_k = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (n, m))
        self.longest = max(n), max(m)
        self.leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.leaves, self.ends_q, self.ends_k, *self.longest)


class PaddedInputs(Inputs):
    """The same as `[B, H, L, E]`, with a mask of the keys that are there."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        super().__init__(shape, dtype, device)
        lengths = shape.query_lengths, shape.key_lengths, shape.key_lengths
        self.leaves = [padded(x.detach(), n).requires_grad_() for x, n in zip(self.leaves, lengths, strict=True)]
        self.grad = padded(self.grad, shape.query_lengths)
        there = torch.arange(self.longest[1], device=device) < torch.tensor(shape.key_lengths, device=device)[:, None]
        self.mask = there[:, None, None]  # [B, 1, 1, L]


@dataclass(frozen=True)
class Competitor:
    """One way to compute attention.

    Attributes:
        make: the output from a set of inputs.
        graph: whether it can be captured in a CUDA graph.
        note: what its time does not include, or includes.
    """

    name: str
    make: Callable[[Any], Tensor]
    inputs: type[Inputs] = Inputs
    graph: bool = True
    note: str = ""


def ours(backend: str) -> Competitor:
    return Competitor(backend, lambda inputs: packed_attention(*inputs.arguments, backend=backend)[0])


def sdpa(kind: SDPBackend, masked: bool) -> Competitor:
    def run(inputs: PaddedInputs) -> Tensor:
        with sdpa_kernel(kind):
            q, k, v = inputs.leaves
            return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask if masked else None)

    name = f"padded SDPA, {kind.name.removesuffix('_ATTENTION').lower()}"
    return Competitor(name, run, PaddedInputs, note="" if masked else "without a mask, which it cannot take")


def varlen(inputs: Inputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(*inputs.arguments)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _flex() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(create_block_mask, dynamic=True), torch.compile(flex_attention, dynamic=True)


def flex(inputs: Inputs) -> Tensor:
    make_mask, attention = _flex()
    rows_q, rows_k = (
        torch.repeat_interleave(torch.arange(len(ends) - 1, device=ends.device), ends.diff(), output_size=len(x))
        for ends, x in ((inputs.ends_q, inputs.q), (inputs.ends_k, inputs.k))
    )

    def same_row(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rows_q[query] == rows_k[key]

    mask = make_mask(same_row, None, None, len(inputs.q), len(inputs.k), device=inputs.q.device)
    out = attention(*(x.transpose(0, 1)[None] for x in inputs.leaves), block_mask=mask)
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)


def flash_attn(inputs: Inputs) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(*inputs.arguments)
    assert isinstance(out, Tensor)
    return out


OURS = tuple(ours(backend) for backend in ("torch", "cuda", "triton"))
OTHERS = (
    Competitor("varlen_attn", varlen),
    sdpa(SDPBackend.FLASH_ATTENTION, masked=False),
    sdpa(SDPBackend.CUDNN_ATTENTION, masked=True),
    sdpa(SDPBackend.EFFICIENT_ATTENTION, masked=True),
)
FLEX = Competitor("FlexAttention", flex, graph=False, note="compiled; the making of its mask is in it")
FLASH = Competitor("flash-attn", flash_attn)


def slow_to_start() -> tuple[Competitor, ...]:
    """What is measured last: one compiles for seconds, the other is rarely installed."""
    return (*((FLASH,) if importlib.util.find_spec("flash_attn") else ()), FLEX)
