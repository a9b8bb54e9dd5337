"""Timing of several systems in one run: they take turns, and the machine's own speed is measured between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[int], Any]
"""Called with the number of the round, which chooses the batch."""
SHAPES = ((1024, 1024, 1024), (1600, 768, 3072), (2048, 512, 2048))
"""Rows, inner size and columns of the products that measure the machine: a square one, and two of the towers'."""
GPU_SCALE = 4
"""A GPU is measured with products of as many times these sizes."""


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        return cls(cuts[0], statistics.median(values), cuts[-1])


def waiter(device: str) -> Callable[[], None]:
    """What waits until the device has done all that was asked of it."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def alternate(
    runs: Mapping[str, Run],
    seconds: float,
    least: int = 3,
    most: int = 200,
    device: str = "cpu",
    advance: Callable[[float], Any] = lambda share: None,
    between: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run of each system: all run once in every round, each round begun by the next of them.

    Rounds go on for `seconds`, but at least `least` and at most `most` of them. Nothing is warmed up here.

    Args:
        advance: called after every round with the share of the work that was done in it.
        between: called before each run of a system, and not timed with it.
    """
    wait, names = waiter(device), list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin, told = time.perf_counter(), 0.0
    number = 0
    while number < least or (number < most and time.perf_counter() - begin < seconds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            between()
            wait()
            start = time.perf_counter()
            runs[name](number)
            wait()
            times[name].append(time.perf_counter() - start)
        number += 1
        passed = time.perf_counter() - begin
        # both must be reached, the seconds and the least number of rounds
        done = min(1.0, number / least, passed / seconds if seconds else 1.0)
        advance(done - told)
        told = done
    advance(1.0 - told)
    return times


class MatmulRate:
    """The machine's own rate of multiplying matrices, measured between the systems: pass `measure` to `alternate`."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        scale = GPU_SCALE if device.startswith("cuda") else 1
        sizes = [tuple(side * scale for side in shape) for shape in SHAPES]
        self._operations = [2.0 * m * k * n for m, k, n in sizes]
        self._factors = [
            (torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype))
            for m, k, n in sizes
        ]
        self._seconds: list[list[float]] = [[] for _ in sizes]
        self._wait = waiter(device)
        for a, b in self._factors:
            a @ b

    def measure(self) -> None:
        """One product of each shape."""
        for (a, b), seconds in zip(self._factors, self._seconds, strict=True):
            self._wait()
            start = time.perf_counter()
            a @ b
            self._wait()
            seconds.append(time.perf_counter() - start)

    @property
    def limit(self) -> float:
        """GFLOP/s: the median of the shape whose median is best."""
        medians = map(statistics.median, self._seconds)
        return max(count / seconds / 1e9 for count, seconds in zip(self._operations, medians, strict=True))
