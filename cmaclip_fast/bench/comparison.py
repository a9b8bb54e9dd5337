"""Our model against its peers at one workload: the same logits first, then times, in turn."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmaclip_fast.bench import flops
from cmaclip_fast.bench.peers import BETWEEN, SYSTEMS, Setting, System
from cmaclip_fast.bench.results import BASELINE, BenchmarkError, Row, Table
from cmaclip_fast.bench.timing import MatmulRate, Run, Spread, alternate
from cmaclip_fast.bench.workloads import Texts, Workload, make_batches
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of a task's largest logit: how far a system's may be from the baseline's."""
WHOLE = 32
"""Up to this batch size the check reads, and so warms up, whole batches; of larger ones the first rows."""
CHECKED_ROWS = 8
LEARNING_RATE = 0.0
"""AdamW does all its work, and every system keeps the same weights."""


@dataclass(frozen=True)
class Measurement:
    """One table: which texts, which systems, and for how long they take turns.

    Attributes:
        seconds: of taking turns; rounds are counted by it.
        least: rounds that are run however long they take.
    """

    texts: Texts
    systems: tuple[str, ...]
    seconds: float
    least: int = 3


@dataclass(frozen=True)
class Group:
    """Tables with a tower, a batch size and a use in common, whose systems are built once."""

    tower: str
    batch: int
    training: bool
    measurements: tuple[Measurement, ...]

    def workload(self, measurement: Measurement) -> Workload:
        return Workload(self.tower, measurement.texts, self.batch, self.training)


@dataclass(frozen=True)
class Machine:
    """Where and how all systems run."""

    device: str
    dtype: torch.dtype
    threads: int


def _kind(name: str) -> type[System]:
    return SYSTEMS.get(name) or BETWEEN[name]


def first_rows(batch: Batch, rows: int) -> Batch:
    labels = {task: values[:rows] for task, values in batch.labels.items()}
    return Batch(batch.images[:rows], batch.tokens[:rows], batch.text_lengths[:rows], batch.present[:rows], labels)


def to_device(batch: Batch, machine: Machine, training: bool) -> Batch:
    """A training batch stays float32, for autocast."""
    moved = batch.to(machine.device)
    return moved if training else replace(moved, images=moved.images.to(machine.dtype))


@contextlib.contextmanager
def mode(machine: Machine, training: bool) -> Iterator[None]:
    """Inference mode, or autocast where training is to run in less than float32."""
    if not training:
        with torch.inference_mode():
            yield
    else:
        kind = machine.device.split(":")[0]
        with torch.autocast(kind, machine.dtype, enabled=machine.dtype is not torch.float32):
            yield


def check_logits(title: str, workload: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """
    Raises:
        BenchmarkError: a task's logits differ by more than `TOLERANCE` allows.
    """
    for task, (one, other) in enumerate(zip(found, expected, strict=True)):
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        tolerance = TOLERANCE[expected[task].dtype]
        difference = float((one - other).abs().max() / other.abs().max())
        if one.shape != other.shape or not difference <= tolerance:
            raise BenchmarkError(
                f"{workload}: the logits of '{title}' differ from the baseline's by {difference:.1e} of the largest"
                f" (task {task}; {tolerance:.0e} is allowed): nothing was timed"
            )


def training_step(system: System, optimizer: torch.optim.Optimizer, machine: Machine) -> Callable[[Batch], None]:
    """Forward, summed task losses, backward, AdamW."""

    def step(batch: Batch) -> None:
        with mode(machine, True):
            loss = system.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_optimizer(system: System) -> torch.optim.AdamW:
    """The same fused AdamW for every system."""
    assert system.module is not None
    return torch.optim.AdamW(system.module.parameters(), lr=LEARNING_RATE, fused=True)


class Comparison:
    """The systems of a group, built from one model."""

    def __init__(self, group: Group, model: CMACLIP, machine: Machine, folder: Path, only: str = "") -> None:
        self.group, self.machine = group, machine
        dtype = torch.float32 if group.training else machine.dtype
        self.model = model.to(machine.device, dtype).train(group.training)
        self._setting = Setting(
            self.model, group.batch, group.training, machine.threads, machine.device, machine.dtype, folder
        )
        self._systems: dict[str, System] = {}
        self._runs: dict[str, Callable[[Batch], Any]] = {}
        self._stepped: set[str] = set()
        self._only = only
        self._state: Any = None

    def table(self, measurement: Measurement, advance: Callable[[float], Any] = lambda share: None) -> Table:
        """Checks and times one workload.

        Raises:
            BenchmarkError: a system's logits are not the baseline's.
        """
        workload = self.group.workload(measurement)
        batches = [to_device(batch, self.machine, self.group.training) for batch in make_batches(self.model, workload)]
        wanted, not_run = [], {}
        for name in measurement.systems:
            if reason := _kind(name).why_not(self.machine.device, self.group.training):
                not_run[_kind(name).title] = reason
            elif self._only in name:
                wanted.append(name)
        baseline = BASELINE if BASELINE in measurement.systems else "longest"
        for name in dict.fromkeys([baseline, *wanted]):
            self._build(name)
            with mode(self.machine, self.group.training):
                self._systems[name].warm(batches[0])
        self._check(workload.name, [baseline, *wanted], batches)
        if self.group.training:
            # the check has no optimizer step, whose first makes the optimizer's state
            for name in self._runs.keys() - self._stepped:
                self._runs[name](batches[0])
            self._stepped |= self._runs.keys()
        runs: dict[str, Run] = {
            name: lambda number, run=self._runs[name]: run(batches[number % len(batches)])  # type: ignore[misc]
            for name in dict.fromkeys([*wanted, baseline])
        }
        rate = MatmulRate(self.machine.device, self.machine.dtype)
        times = alternate(
            runs,
            measurement.seconds,
            max(measurement.least, 1),
            device=self.machine.device,
            advance=advance,
            between=rate.measure,
        )
        return self._summary(workload, batches, times, baseline, rate.limit, not_run)

    def close(self) -> None:
        for system in self._systems.values():
            system.close()
        self._systems.clear()
        self._runs.clear()
        if self.machine.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _build(self, name: str) -> None:
        if name in self._systems:
            return
        system = self._systems[name] = _kind(name)(self._setting)
        if self.group.training:
            optimizer = make_optimizer(system)
            # most parameters are shared between the systems, and so is what AdamW keeps of them
            if self._state is None:
                self._state = optimizer.state
            optimizer.state = self._state
            self._runs[name] = training_step(system, optimizer, self.machine)
        else:
            self._runs[name] = torch.inference_mode()(system.logits)

    def _check(self, workload: str, names: Sequence[str], batches: Sequence[Batch]) -> None:
        baseline, *others = dict.fromkeys(names)
        for batch in batches:
            part = batch if len(batch) <= WHOLE else first_rows(batch, CHECKED_ROWS)
            with mode(self.machine, self.group.training):
                expected = [logits.detach() for logits in self._systems[baseline].logits(part)]
                for name in others:
                    check_logits(_kind(name).title, workload, self._systems[name].logits(part), expected)

    def _summary(
        self,
        workload: Workload,
        batches: Sequence[Batch],
        times: Mapping[str, Sequence[float]],
        baseline: str,
        limit: float,
        not_run: dict[str, str],
    ) -> Table:
        shape = flops.Shape.of(self.model)
        lengths = [batch.text_lengths.tolist() for batch in batches]

        def whole(forward: float, rows: int) -> float:
            return flops.training(shape, rows, forward) if workload.training else forward

        needed = [whole(flops.useful(shape, row_lengths), len(row_lengths)) for row_lengths in lengths]
        context = self.model.tokenizer.context_length
        spent = {
            "77": [whole(flops.padded(shape, len(one), context), len(one)) for one in lengths],
            "longest": [whole(flops.padded(shape, len(one), max(one)), len(one)) for one in lengths],
        }
        pairs = sum(len(one) for one in lengths)
        rows = []
        for name, taken in times.items():
            rates = [needed[i % len(needed)] / seconds / 1e9 for i, seconds in enumerate(taken)]
            against = [theirs / ours for theirs, ours in zip(times[baseline], taken, strict=True)]
            milliseconds = Spread.of([seconds * 1e3 for seconds in taken])
            rows.append(
                Row(
                    name,
                    _kind(name).title,
                    milliseconds,
                    workload.batch * 1e3 / milliseconds.median,
                    Spread.of(against),
                    statistics.median(rates),
                    statistics.median(rates) / limit,
                    len(taken),
                    dict(self._systems[name].prepared),
                )
            )
        return Table(
            workload.name,
            workload.tower,
            workload.texts.value,
            workload.batch,
            workload.training,
            statistics.mean(length for one in lengths for length in one),
            sum(needed) / pairs / 1e9,
            {padding: sum(counts) / pairs / 1e9 for padding, counts in spent.items()},
            limit,
            baseline,
            rows,
            not_run,
        )
