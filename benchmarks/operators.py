"""Times the operators against what PyTorch offers for the same.

    python benchmarks/operators.py attention --write benchmarks/results

The two alternate in one run; times are medians, with the 20th and 80th percentile. SDPA gets rows of equal length
contiguous as [B, H, L, E]; where it is given a mask, the rows' lengths average a quarter of the longest. The other
operators stand against the loop over tasks, or the concatenation and the mask, that they replace. The folder gets the
numbers and the table; they keep the machine's load too: above 0 before, other work has disturbed the times.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from cmaclip_fast import env
from cmaclip_fast.bench.loops import binary_cross_entropy_loop, cross_entropy_loop, keyless_loop
from cmaclip_fast.ops import (
    modality_pool,
    multitask_binary_cross_entropy,
    multitask_cross_entropy,
    pack_tokens,
    packed_attention,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = {"cpu": ["cpp"], "cuda": ["cuda", "triton"]}
SECONDS = 1.0
"""Measured time of each pair, at least five runs and at most a hundred."""


@dataclass
class Target:
    """What runs the operators: a device, one of its backends, and an element type.

    With `compiled`, what the operators are compared with is compiled.
    """

    device: str
    backend: str
    dtype: str
    compiled: bool = False

    def randn(self, *sizes: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(sizes))
        return torch.randn(*sizes, generator=generator).to(self.device, DTYPES[self.dtype])


@dataclass
class Pair:
    """One row of the table: the two ways to compute the same, and the floating-point operations that it takes.

    `operations` is 0 where memory, not arithmetic, takes the time.
    """

    operator: str
    name: str
    backend: str
    dtype: str
    what: str
    operations: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


@dataclass
class Measured:
    operator: str
    name: str
    backend: str
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
    pack = "pack"
    pool = "pool"
    loss = "loss"
    binary_loss = "binary_loss"


def main(
    operators: Annotated[list[Operator] | None, typer.Argument(help="Operators to time; all if none is named.")] = None,
    dtypes: Annotated[list[str], typer.Option("--dtype", help="Element types.")] = ["float32", "bfloat16"],  # noqa: B006
    only: Annotated[str, typer.Option(help="Time only what has this in its name.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backends: Annotated[list[str] | None, typer.Option("--backend", help="All of the device if none is named.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that PyTorch uses on the CPU.")] = None,
    write: Annotated[Path | None, typer.Option(help="Also keep the numbers in this folder, as JSON.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    results: list[Measured] = []
    load = os.getloadavg()[0]
    heading = "| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS)
    print(heading)
    for operator in operators or list(Operator):
        targets = [Target(device, backend, dtype) for backend in backends or BACKENDS[device] for dtype in dtypes]
        for target in targets:
            for pair in PAIRS[operator](target):
                if only in pair.name:
                    results.append(measure(pair, device))
                    print(line(results[-1]), flush=True)
    if write is not None:
        name = (
            torch.cuda.get_device_name()
            if device == "cuda"
            else "cpu-{instruction_set}-{threads}-threads".format(**env.processor())
        )
        write.mkdir(parents=True, exist_ok=True)
        loads = {"before": load, "after": os.getloadavg()[0]}
        about = (
            f"{datetime.date.today()}, {name}, torch {torch.__version__}; load before the run {loads['before']:.2f}, "
            f"after it {loads['after']:.2f}."
        )
        page = "\n".join([about, "", heading, *map(line, results)])
        (write / f"operators-{device}.md").write_text(page + "\n", encoding="utf-8")
        write /= f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{datetime.date.today()}.json"
        report: dict[str, Any] = {
            "date": str(datetime.date.today()),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
        }
        report["load"] = loads
        report |= {
            name: env.as_dict()[name] for name in ("platform", "python", "packages", "processor", "gpus", "extension")
        }
        report["results"] = [asdict(result) for result in results]
        write.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {write}")


def pairs(
    target: Target,
    operator: str,
    name: str,
    leaves: list[Tensor],
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
) -> Iterator[Pair]:
    """Forward, and forward with the gradients of `leaves`, of two ways to the same tensor."""
    for leaf in leaves:
        leaf.requires_grad_()
    if target.compiled:
        theirs = torch.compile(theirs)
    torch.testing.assert_close(ours().float(), theirs().float(), atol=0.05, rtol=0.05)
    grad = torch.ones_like(theirs())
    for what, wrap in (
        ("forward", torch.no_grad()),
        ("forward+backward", lambda run: lambda: torch.autograd.grad(run(), leaves, grad)),
    ):
        yield Pair(operator, name, target.backend, target.dtype, what, 0, wrap(ours), wrap(theirs))


POOL_SHAPES = ((32, 3), (32, 64), (256, 64))
"""Rows and tasks."""
PACK_SHAPES = ((32, 20), (32, 77), (256, 20))
"""Rows and mean tokens of their texts."""
LOSS_SHAPES = ((32, [19, 61, 12]), (32, [20] * 64), (32, [10] * 1024), (32, [100_000]))
"""Rows and classes of each task."""


def pool(target: Target, shapes: Sequence[tuple[int, int]] = POOL_SHAPES) -> Iterator[Pair]:
    for rows, tasks in shapes:
        embeddings, weight = target.randn(rows, 2, 512), target.randn(tasks, 2, 512) / 512**0.5
        present = (torch.arange(2 * rows).reshape(rows, 2) % 5 > 0).to(target.device)

        def ours(e: Tensor = embeddings, w: Tensor = weight, p: Tensor = present) -> Tensor:
            return modality_pool(e, w, p, backend=target.backend)[0]

        def theirs(e: Tensor = embeddings, w: Tensor = weight, p: Tensor = present) -> Tensor:
            return keyless_loop(e, w, p)

        yield from pairs(target, "modality_pool", f"{rows} rows, {tasks} tasks", [embeddings, weight], ours, theirs)


def pack(target: Target, shapes: Sequence[tuple[int, int]] = PACK_SHAPES) -> Iterator[Pair]:
    for rows, mean in shapes:
        lengths = torch.linspace(max(2 * mean - 77, 3), min(2 * mean, 77), rows).int().to(target.device)
        counts = torch.stack([lengths, torch.full_like(lengths, 50)], dim=1)
        starts = counts.cumsum(0, dtype=torch.int32) - counts
        text, image = (target.randn(int(size), 512) for size in counts.sum(0))
        types = target.randn(2, 512)

        def ours(
            text: Tensor = text, image: Tensor = image, types: Tensor = types, s: Tensor = starts, c: Tensor = counts
        ) -> Tensor:
            return pack_tokens(text, image, s, c, types, backend=target.backend)[0]

        def theirs(
            text: Tensor = text, image: Tensor = image, types: Tensor = types, s: Tensor = starts, c: Tensor = counts
        ) -> Tensor:
            ends = c.sum(1).cumsum(0)
            place = torch.arange(int(ends[-1]), device=c.device)
            row = torch.searchsorted(ends, place, right=True)
            place = place - (ends - c.sum(1))[row]
            source = torch.where(place < c[row, 0], s[row, 0] + place, len(text) + s[row, 1] + place - c[row, 0])
            return torch.cat([text + types[0], image + types[1]])[source]

        yield from pairs(target, "pack_tokens", f"{rows} rows, mean text {mean}", [text, image, types], ours, theirs)


def loss(target: Target, shapes: Sequence[tuple[int, list[int]]] = LOSS_SHAPES) -> Iterator[Pair]:
    for rows, classes in shapes:
        logits = target.randn(rows, sum(classes))
        bounds = [0, *itertools.accumulate(classes)]
        offsets = torch.tensor(bounds, dtype=torch.int32, device=target.device)
        generator = torch.Generator().manual_seed(0)
        labels = torch.stack([torch.randint(-1, n, (rows,), generator=generator) for n in classes], 1).to(target.device)
        labels[0] = 0

        def ours(x: Tensor = logits, y: Tensor = labels, ends: Tensor = offsets) -> Tensor:
            return multitask_cross_entropy(x, y, ends, backend=target.backend)

        def theirs(x: Tensor = logits, y: Tensor = labels, ends: list[int] = bounds) -> Tensor:
            return cross_entropy_loop(x, y, ends)

        name = f"{rows} rows, {len(classes)} tasks of {sum(classes) // len(classes)} classes"
        yield from pairs(target, "multitask_cross_entropy", name, [logits], ours, theirs)


def binary_loss(target: Target, shapes: Sequence[tuple[int, list[int]]] = LOSS_SHAPES) -> Iterator[Pair]:
    """The asymmetric loss, with the exponents and the margin of its paper."""
    for rows, classes in shapes:
        logits = target.randn(rows, sum(classes))
        bounds = [0, *itertools.accumulate(classes)]
        offsets = torch.tensor(bounds, dtype=torch.int32, device=target.device)
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(-1, 2, (rows, sum(classes)), generator=generator, dtype=torch.int8)
        targets[0] = 1
        targets = targets.to(target.device)

        def ours(x: Tensor = logits, y: Tensor = targets, ends: Tensor = offsets) -> Tensor:
            return multitask_binary_cross_entropy(
                x, y, ends, gamma_positive=1, gamma_negative=4, margin=0.05, backend=target.backend
            )

        def theirs(x: Tensor = logits, y: Tensor = targets, ends: list[int] = bounds) -> Tensor:
            return binary_cross_entropy_loop(x, y, ends, 1, 4, 0.05)

        name = f"{rows} rows, {len(classes)} tasks of {sum(classes) // len(classes)} classes"
        yield from pairs(target, "multitask_binary_cross_entropy", name, [logits], ours, theirs)


def attention(target: Target) -> Iterator[Pair]:
    for shape in SHAPES:
        yield from attention_pairs(shape, target)


def attention_pairs(shape: Shape, target: Target) -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(0)
    k_lengths = lengths(shape)
    q_lengths = k_lengths if shape.queries is None else [shape.queries] * shape.rows
    q, grad = (tokens(q_lengths, shape, target, generator) for _ in range(2))
    k, v = (tokens(k_lengths, shape, target, generator) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    padded_leaves = [
        padded(x.detach(), n).requires_grad_()
        for x, n in zip((q, k, v), (q_lengths, k_lengths, k_lengths), strict=True)
    ]
    padded_grad = padded(grad, q_lengths)
    mask = None
    if shape.masked:
        mask = (torch.arange(shape.length) < torch.tensor(k_lengths)[:, None])[:, None, None]  # [B, 1, 1, L]
        mask = mask.to(target.device)
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0).to(target.device, torch.int32) for n in (q_lengths, k_lengths))

    def ours() -> Tensor:
        q, k, v = leaves
        options: dict[str, Any] = {"causal": shape.causal, "backend": target.backend}
        return packed_attention(q, k, v, ends_q, ends_k, max(q_lengths), max(k_lengths), **options)[0]

    def theirs() -> Tensor:
        q, k, v = padded_leaves
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=shape.causal)

    def without_gradient(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(run)

    scores = sum(n * (m / 2 if shape.causal else m) for n, m in zip(q_lengths, k_lengths, strict=True))
    operations = 4 * scores * shape.heads * shape.size
    named = ("packed_attention", str(shape), target.backend, target.dtype)
    yield Pair(*named, "forward", operations, without_gradient(ours), without_gradient(theirs))
    yield Pair(
        *named,
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


def tokens(row_lengths: list[int], shape: Shape, target: Target, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(sum(row_lengths), shape.heads, shape.size, generator=generator)
    return drawn.to(target.device, DTYPES[target.dtype])


def padded(packed: Tensor, row_lengths: list[int]) -> Tensor:
    """`[T, H, E]` as `[B, H, L, E]`."""
    rows = torch.nn.utils.rnn.pad_sequence(packed.split(row_lengths), batch_first=True)
    return rows.transpose(1, 2).contiguous()


def measure(pair: Pair, device: str) -> Measured:
    rate = matmul_rate(pair.dtype, device)
    ours, theirs = alternate(pair.ours, pair.theirs, device=device)
    gflops = pair.operations / ours[1] / 1e6
    named = (pair.operator, pair.name, pair.backend, pair.dtype, pair.what)
    return Measured(*named, ours, theirs, theirs[1] / ours[1], gflops, matmul_share=gflops / rate)


def alternate(*runs: Callable[[], Any], device: str = "cpu") -> list[tuple[float, float, float]]:
    """Milliseconds of each: 20th percentile, median, 80th percentile."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for run in runs * 2:
        run()
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(times[0]) < 5 or (time.perf_counter() - begin < SECONDS and len(times[0]) < 100):
        for run, taken in zip(runs, times, strict=True):
            wait()
            start = time.perf_counter()
            run()
            wait()
            taken.append((time.perf_counter() - start) * 1e3)
    cuts = [statistics.quantiles(taken, n=5, method="inclusive") for taken in times]
    return [(cut[0], statistics.median(taken), cut[-1]) for cut, taken in zip(cuts, times, strict=True)]


def matmul_rate(dtype: str, device: str) -> float:
    """GFLOP/s of a product of square matrices."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    ((_, median, _),) = alternate(lambda: a @ b, device=device)
    return 2 * size**3 / median / 1e6


HEADINGS = (
    "operator",
    "shape",
    "backend",
    "dtype",
    "",
    "ours, ms (p20-p80)",
    "PyTorch, ms (p20-p80)",
    "ratio",
    "GFLOP/s",
    "of matmul",
)


def line(result: Measured) -> str:
    """A row of the table."""

    def milliseconds(times: tuple[float, float, float]) -> str:
        return f"{times[1]:.2f} ({times[0]:.2f}-{times[2]:.2f})"

    cells = [
        *(result.operator, result.name, result.backend, result.dtype, result.what),
        *(milliseconds(result.ours), milliseconds(result.theirs)),
        f"{result.ratio:.2f}",
        *((f"{result.gflops:.0f}", f"{result.matmul_share:.0%}") if result.gflops else ("", "")),
    ]
    return "| " + " | ".join(cells) + " |"


PAIRS: dict[Operator, Callable[[Target], Iterator[Pair]]] = {
    Operator.attention: attention,
    Operator.pack: pack,
    Operator.pool: pool,
    Operator.loss: loss,
    Operator.binary_loss: binary_loss,
}


if __name__ == "__main__":
    typer.run(main)
