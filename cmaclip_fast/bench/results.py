"""The results of a benchmark run, in the structure of its JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cmaclip_fast.bench.timing import Spread

BASELINE = "plain"
"""The system that ratios are against, and what it is against where that was left out: `longest`."""


@dataclass
class Row:
    """One system at one workload.

    Attributes:
        system: its short name; `title` is for tables.
        milliseconds: of a batch.
        pairs_per_second: median.
        speedup: the baseline's time over this one's, round by round; above 1 is faster.
        useful_gflops: useful operations a second, in 10^9; what is spent on padding does not count.
        limit_share: of the machine's rate of multiplying matrices.
        rounds: how often it ran.
        prepared: seconds spent once before: compilation, export, loading.
    """

    system: str
    title: str
    milliseconds: Spread
    pairs_per_second: float
    speedup: Spread
    useful_gflops: float
    limit_share: float
    rounds: int
    prepared: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    """One workload.

    Attributes:
        mean_length: tokens of a text, on average.
        useful_gflop: operations that the outputs need for a pair, in 10^9.
        padded_gflop: those of a system that pads to 77, and to the longest.
        limit_gflops: the machine's rate of multiplying matrices, measured in turn with the systems.
        baseline: the system that `speedup` is against.
        not_run: for a system that is missing, why.
    """

    workload: str
    tower: str
    texts: str
    batch: int
    training: bool
    mean_length: float
    useful_gflop: float
    padded_gflop: dict[str, float]
    limit_gflops: float
    baseline: str
    rows: list[Row]
    not_run: dict[str, str]

    def row(self, system: str) -> Row | None:
        return next((row for row in self.rows if row.system == system), None)


@dataclass
class Memory:
    """A training step of one system, in a process of its own. Bytes; None where the system cannot tell.

    Attributes:
        state: resident before the step: the process, the weights and the optimizer's state, no gradients.
        forward_backward: the most that a forward and backward took above `state`: activations and gradients.
        step: the most that the whole step took above `state`, optimizer included.
        gradients: the size of the weights' gradients, which every system has.
    """

    workload: str
    system: str
    title: str
    batch: int
    state: int | None
    forward_backward: int | None
    step: int | None
    gradients: int


@dataclass
class Part:
    """An operator against the loop of modules that it replaces; milliseconds."""

    operator: str
    what: str
    ours: Spread
    loop: Spread
    ratio: float


@dataclass
class Curve:
    """How the time of a batch grows with one number.

    Attributes:
        axis: what grows.
        values: of it.
        batch: pairs at a time, at each value.
        milliseconds: for each system, of a batch at each value.
        exponent: for each system, of the growth of its time over the two largest values; 1 is linear.
    """

    title: str
    axis: str
    values: list[int]
    batch: list[int]
    milliseconds: dict[str, list[float]]
    exponent: dict[str, float]


@dataclass
class Pipeline:
    """Pictures a second from files to tensors, against what the model takes.

    Attributes:
        loader: pictures a second of one loader process on one core, decoded, resized and normalised.
        model: for each device and use, pairs a second.
        processes: loader processes that keep it busy.
        assumed: what the figures that were calculated rest on.
    """

    loader: float
    model: dict[str, float]
    processes: dict[str, int]
    assumed: str


@dataclass
class Step:
    """One step from the plain implementation to ours.

    Attributes:
        name: what it does.
        gflop: operations of a pair, in 10^9.
        predicted: the step before's operations over this one's: what it gains where all operations cost the same.
        gained: the step before's time over this one's, by the medians.
        speedup: over the plain implementation, round by round.
    """

    name: str
    gflop: float
    predicted: float
    gained: float
    speedup: Spread


@dataclass
class Steps:
    """All steps at one workload."""

    workload: str
    steps: list[Step]


@dataclass
class Report:
    """One run of the benchmark. `machine` is what `cmaclip env` says, and the load before and after."""

    date: str
    device: str
    dtype: str
    threads: int
    quick: bool
    machine: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    pipeline: Pipeline | None = None
    steps: Steps | None = None


class BenchmarkError(Exception):
    """Systems that disagree, or a figure below its floor: the benchmark fails with one line."""
