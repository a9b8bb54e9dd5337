"""Times the operators of this machine's fastest backend against what PyTorch offers for the same.

    python benchmarks/operators.py attention --write benchmarks/results/operators-cpu.json

The two alternate in one run; times are medians, with the 20th and 80th percentile. SDPA gets rows of equal length
contiguous as [B, H, L, E]; where it is given a mask, the rows' lengths average a quarter of the longest. The file keeps
the machine's load too: above 0 before, other work has disturbed the times.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from cmaclip_fast import env
from cmaclip_fast.ops import packed_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 1.0
"""Measured time of each pair, at least five runs and at most a hundred."""


@dataclass
class Pair:
    """One row of the table: the two ways to compute the same, and the floating-point operations that it takes."""

    name: str
    dtype: str
    what: str
    operations: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


@dataclass
class Measured:
    name: str
    dtype: str
    what: str
    ours: tuple[float, float, float]
    """Milliseconds: 20th percentile, median, 80th percentile."""
    theirs: tuple[float, float, float]
    ratio: float
    """Their median over ours: above 1, ours is faster."""
    gflops: float
    matmul_share: float
    """Of the rate of `torch.mm` in the same dtype, measured just before."""


@dataclass
class Shape:
    rows: int
    heads: int
    length: int
    size: int
    causal: bool = False
    queries: int | None = None
    masked: bool = False

    def __str__(self) -> str:
        text = f"{self.rows} x {self.heads} x {self.length} x {self.size}"
        if self.queries is not None:
            text += f", {self.queries} queries"
        return text + ", causal" * self.causal + ", lengths a quarter, mask" * self.masked


SHAPES = (
    Shape(32, 8, 127, 64),
    Shape(32, 12, 50, 64),
    Shape(32, 8, 77, 64, causal=True),
    Shape(64, 4, 45, 32),
    Shape(8, 12, 197, 64),
    Shape(4, 8, 1024, 64),
    Shape(1, 8, 4096, 64),
    Shape(16, 12, 77, 80),
    Shape(16, 6, 128, 96),
    Shape(8, 8, 256, 128),
    Shape(32, 8, 127, 64, queries=2),
    Shape(32, 8, 50, 64, queries=2),
    Shape(32, 8, 127, 64, masked=True),
    Shape(8, 8, 1024, 64, masked=True),
)


class Operator(str, Enum):
    attention = "attention"


def main(
    operators: Annotated[list[Operator] | None, typer.Argument(help="Operators to time; all if none is named.")] = None,
    dtypes: Annotated[list[str], typer.Option("--dtype", help="Element types.")] = ["float32", "bfloat16"],  # noqa: B006
    only: Annotated[str, typer.Option(help="Time only what has this in its name.")] = "",
    threads: Annotated[int | None, typer.Option(help="Threads that PyTorch uses.")] = None,
    write: Annotated[Path | None, typer.Option(help="Also keep the numbers here, as JSON.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    results, load = [], os.getloadavg()[0]
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    for operator in operators or list(Operator):
        for dtype in dtypes:
            for pair in PAIRS[operator](dtype):
                if only in pair.name:
                    results.append(measure(pair))
                    print("| " + " | ".join(cells(results[-1])) + " |", flush=True)
    if write is not None:
        report = {"date": str(datetime.date.today()), "torch_isa": torch.backends.cpu.get_cpu_capability()}
        report["load"] = {"before": load, "after": os.getloadavg()[0]}
        report |= {name: env.as_dict()[name] for name in ("platform", "python", "packages", "processor", "extension")}
        report["results"] = [asdict(result) for result in results]
        write.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def attention(dtype: str) -> Iterator[Pair]:
    for shape in SHAPES:
        yield from attention_pairs(shape, dtype)


def attention_pairs(shape: Shape, dtype: str) -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(0)
    k_lengths = lengths(shape)
    q_lengths = k_lengths if shape.queries is None else [shape.queries] * shape.rows
    q, grad = (tokens(q_lengths, shape, dtype, generator) for _ in range(2))
    k, v = (tokens(k_lengths, shape, dtype, generator) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    padded_leaves = [
        padded(x.detach(), n).requires_grad_()
        for x, n in zip((q, k, v), (q_lengths, k_lengths, k_lengths), strict=True)
    ]
    padded_grad = padded(grad, q_lengths)
    mask = None
    if shape.masked:
        mask = (torch.arange(shape.length) < torch.tensor(k_lengths)[:, None])[:, None, None]  # [B, 1, 1, L]
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (q_lengths, k_lengths))
    longest = max(q_lengths), max(k_lengths)

    def ours() -> Tensor:
        return packed_attention(*leaves, ends_q, ends_k, *longest, causal=shape.causal)[0]

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(*padded_leaves, attn_mask=mask, is_causal=shape.causal)

    def without_gradient(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(run)

    scores = sum(n * (m / 2 if shape.causal else m) for n, m in zip(q_lengths, k_lengths, strict=True))
    operations = 4 * scores * shape.heads * shape.size
    yield Pair(str(shape), dtype, "forward", operations, without_gradient(ours), without_gradient(theirs))
    yield Pair(
        str(shape),
        dtype,
        "forward+backward",
        3.5 * operations,
        lambda: torch.autograd.grad(ours(), leaves, grad),
        lambda: torch.autograd.grad(theirs(), padded_leaves, padded_grad),
    )


def lengths(shape: Shape) -> list[int]:
    if not shape.masked:
        return [shape.length] * shape.rows
    # One row of the full length; the others equally far apart, so that all average a quarter of it.
    mean = (shape.length / 4 * shape.rows - shape.length) / (shape.rows - 1)
    others = [max(1, round(mean * (2 * i + 1) / (shape.rows - 1))) for i in range(shape.rows - 1)]
    return [shape.length, *others]


def tokens(row_lengths: list[int], shape: Shape, dtype: str, generator: torch.Generator) -> Tensor:
    return torch.randn(sum(row_lengths), shape.heads, shape.size, generator=generator).to(DTYPES[dtype])


def padded(packed: Tensor, row_lengths: list[int]) -> Tensor:
    """`[T, H, E]` as `[B, H, L, E]`."""
    rows = torch.nn.utils.rnn.pad_sequence(packed.split(row_lengths), batch_first=True)
    return rows.transpose(1, 2).contiguous()


def measure(pair: Pair) -> Measured:
    rate = matmul_rate(pair.dtype)
    ours, theirs = alternate(pair.ours, pair.theirs)
    gflops = pair.operations / ours[1] / 1e6
    return Measured(
        pair.name, pair.dtype, pair.what, ours, theirs, theirs[1] / ours[1], gflops, matmul_share=gflops / rate
    )


def alternate(*runs: Callable[[], Any]) -> list[tuple[float, float, float]]:
    """Milliseconds of each: 20th percentile, median, 80th percentile."""
    for run in runs * 2:
        run()
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(times[0]) < 5 or (time.perf_counter() - begin < SECONDS and len(times[0]) < 100):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append((time.perf_counter() - start) * 1e3)
    cuts = [statistics.quantiles(taken, n=5, method="inclusive") for taken in times]
    return [(cut[0], statistics.median(taken), cut[-1]) for cut, taken in zip(cuts, times, strict=True)]


def matmul_rate(dtype: str, size: int = 1024) -> float:
    """GFLOP/s of a product of square matrices."""
    a, b = (torch.randn(size, size).to(DTYPES[dtype]) for _ in range(2))
    ((_, median, _),) = alternate(lambda: a @ b)
    return 2 * size**3 / median / 1e6


HEADINGS = ("shape", "dtype", "", "ours, ms (p20-p80)", "PyTorch, ms (p20-p80)", "ratio", "GFLOP/s", "of matmul")


def cells(result: Measured) -> list[str]:
    def milliseconds(times: tuple[float, float, float]) -> str:
        return f"{times[1]:.2f} ({times[0]:.2f}-{times[2]:.2f})"

    return [
        *(result.name, result.dtype, result.what, milliseconds(result.ours), milliseconds(result.theirs)),
        *(f"{result.ratio:.2f}", f"{result.gflops:.0f}", f"{result.matmul_share:.0%}"),
    ]


PAIRS: dict[Operator, Callable[[str], Iterator[Pair]]] = {Operator.attention: attention}


if __name__ == "__main__":
    typer.run(main)
