"""Times of calls on a GPU: CUDA events, inputs that outgrow the L2 cache, medians, and what the GPU can reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cmaclip_fast.bench.timing import Spread

SECONDS = 0.04
"""Measured time of each call, at least five rounds and at most fifty."""
MOST_SETS = 48
Call = Callable[[], Any]


@dataclass(frozen=True)
class Roofs:
    """What a large copy and a large matrix product reach: bytes and operations a second."""

    bytes: float
    operations: float


def sets_needed(bytes_of_one: int, device: str) -> int:
    """How many sets of inputs to rotate so that together they are twice as large as the L2 cache."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_SETS, -(-2 * cache // max(bytes_of_one, 1))))


def microseconds(calls: Sequence[Call], device: str, graph: bool = True) -> Spread:
    """Of one call, when `calls`, which do the same with different inputs, run one after the other.

    With `graph` they run as one CUDA graph, so that the time is the GPU's; without it, launches are in it.
    """
    if device == "cpu":
        start = time.perf_counter()
        calls[0]()
        return Spread.of([(time.perf_counter() - start) * 1e6])
    for call in (*calls, calls[0]):
        call()
    torch.cuda.synchronize()
    run = _captured(calls) if graph else lambda: [call() for call in calls]
    once = _rounds(run, 2)[-1]
    rounds = max(5, min(50, round(SECONDS * 1e3 / max(once, 1e-3))))
    return Spread.of([milliseconds * 1e3 / len(calls) for milliseconds in _rounds(run, rounds)])


def _captured(calls: Sequence[Call]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _rounds(run: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each of `count` runs."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def roofs(device: str) -> Roofs:
    """A copy of 2 GiB, read and written, and a product of two bfloat16 matrices of 8192 x 8192."""
    on_gpu = device != "cpu"
    count, side = (1 << 31, 8192) if on_gpu else (1 << 16, 64)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = microseconds([lambda: target.copy_(source)], device, graph=False).median
    product = microseconds([lambda: a @ b], device, graph=False).median
    return Roofs(2 * count / copy * 1e6, 2 * side**3 / product * 1e6)
