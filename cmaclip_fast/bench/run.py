"""One run of the whole benchmark: `benchmark` measures, writes and guards."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmaclip_fast import env
from cmaclip_fast.bench import guard, scale
from cmaclip_fast.bench.comparison import WHOLE, Comparison, Group, Machine, Measurement
from cmaclip_fast.bench.memory import measure_apart
from cmaclip_fast.bench.parts import measure_parts
from cmaclip_fast.bench.peers import SYSTEMS
from cmaclip_fast.bench.plan import FULL, QUICK, Plan
from cmaclip_fast.bench.report import write_report
from cmaclip_fast.bench.results import BenchmarkError, Curve, Report
from cmaclip_fast.bench.steps import STEPS, measure_steps
from cmaclip_fast.bench.workloads import make_model
from cmaclip_fast.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("transformers", "onnxruntime", "openvino")
TOWER = "ViT-B-32"
"""Of the curves and the input pipeline."""
Advance = Callable[[float], Any]


@dataclass(frozen=True)
class Options:
    """What `cmaclip bench` was asked for.

    Attributes:
        output: folder of `performance.md`, `.json` and `.png`.
        only: only tables and other parts with this in their name; after a `/`, only systems with that in theirs.
        threads: of the CPU; None leaves PyTorch's own choice.
        dtype: None is float32 on a CPU and bfloat16 on a GPU.
        floors: the file of floors, or None for no guard.
        record: set the floors by this run instead of failing below them.
    """

    output: Path
    quick: bool = False
    only: str = ""
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    floors: Path | None = None
    record: bool = False

    def machine(self) -> Machine:
        on_gpu = self.device.startswith("cuda")
        dtype = self.dtype or ("bfloat16" if on_gpu else "float32")
        if dtype not in DTYPES:
            raise InputError(f"--dtype {dtype}: unknown: pass one of {', '.join(DTYPES)}")
        return Machine(self.device, DTYPES[dtype], self.threads or torch.get_num_threads())


@dataclass
class Step:
    """A part of the run: its name, about how many seconds it takes, and what it adds to the report."""

    name: str
    seconds: float
    run: Callable[[Report, Advance], None]


def benchmark(options: Options, console: Console, plan: Plan | None = None) -> Report:
    """Runs the plan, writes the report after each part, and holds it against the floors.

    Raises:
        InputError: an option that does not fit, or a file of floors that cannot be read.
        BenchmarkError: systems disagree, or a figure is below its floor; the report is written in that case.
    """
    plan = plan or (QUICK if options.quick else FULL)
    machine = options.machine()
    if options.record and options.floors is None:
        raise InputError("--record: where to? Name the file with --floors")
    known = guard.read_floors(options.floors, machine.device) if options.floors and not options.record else {}
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(
        str(datetime.date.today()),
        machine.device,
        str(machine.dtype).removeprefix("torch."),
        machine.threads,
        options.quick,
        {},
    )
    before = load()
    with threads(machine.threads), tempfile.TemporaryDirectory() as folder:
        name, _, system = options.only.partition("/")
        chosen = list(steps(plan, machine, Path(folder), name, system))
        if not chosen:
            raise InputError(f"--only {options.only}: no step has this in its name")
        order = [group.workload(one).name for group in plan.groups for one in group.measurements]
        # the short ones first, so that an interrupted run leaves most; the input pipeline looks at the tables
        chosen.sort(key=lambda step: (step.name == "input pipeline", step.seconds))
        with progress(console) as bar:
            task = bar.add_task("", total=sum(step.seconds for step in chosen))
            for step in chosen:
                bar.update(task, description=step.name)
                done = bar.tasks[task].completed

                def advance(share: float, step: Step = step) -> None:
                    bar.advance(task, share * step.seconds)

                step.run(report, advance)
                bar.update(task, completed=done + step.seconds)
                report.tables.sort(key=lambda table: order.index(table.workload))
                report.machine = machine_record(before)
                write_report(report, options.output)
    if options.floors and options.record:
        count = guard.record(report, options.floors)
        console.print(f"{count} floors set in {options.floors}", soft_wrap=True, highlight=False)
    if failed := guard.below(report, known):
        raise BenchmarkError("; ".join(failed))
    return report


def steps(plan: Plan, machine: Machine, folder: Path, only: str = "", system: str = "") -> Iterator[Step]:
    """What the plan asks for and has `only` in its name, in order; `system` chooses systems."""
    for group in plan.groups:
        chosen = tuple(one for one in group.measurements if only in group.workload(one).name)
        if chosen:
            use = "training" if group.training else "inference"
            name = f"{group.tower}, {use} at batch {group.batch}"
            group_step = _comparison(replace(group, measurements=chosen), machine, folder, system)
            yield Step(name, sum(estimate(group, one) for one in chosen), group_step)
    if plan.steps_seconds and only in "steps":
        rounds = plan.steps_seconds + 12.0 * len(STEPS)
        yield Step("steps", rounds, _gains(machine, folder, plan.steps_seconds))
    seconds = plan.point_seconds
    curves: dict[str, tuple[tuple[int, ...], Callable[[Advance], Curve]]] = {
        "batch": (plan.batches, lambda tell: scale.with_batch(TOWER, plan.batches, machine, seconds, tell)),
        "text": (plan.lengths, lambda tell: scale.with_text(TOWER, plan.lengths, machine, seconds, tell)),
        "tasks": (plan.tasks, lambda tell: scale.with_tasks(plan.tasks, machine, seconds, tell)),
        "classes": (plan.classes, lambda tell: scale.with_classes(plan.classes, machine, seconds, tell)),
    }
    trained = next(((group, group.measurements[0]) for group in plan.groups if group.training), None)
    systems = [name for name in plan.memory if system in name and runs_here(name, machine)]
    if trained is not None and systems:
        name = f"memory of {trained[0].workload(trained[1]).name}"
        if only in name:
            yield Step(name, 40.0 * len(systems), _memory(*trained, machine, systems))
    others = [Step("operators", 4 * plan.part_seconds, _parts(machine, plan.part_seconds))] if plan.part_seconds else []
    others += [
        Step(f"scale with {name}", (5.0 + seconds) * len(values), _curve(measure))
        for name, (values, measure) in curves.items()
        if values
    ]
    if plan.loader_seconds:
        others.append(Step("input pipeline", plan.loader_seconds + 5, _pipeline(plan.loader_seconds)))
    yield from (step for step in others if only in step.name)


def estimate(group: Group, measurement: Measurement) -> float:
    """Seconds, roughly, for the progress bar alone: of two AVX2 cores."""
    pair = 0.1 if group.tower == "ViT-B-32" else 0.3
    one = group.batch * pair * (3 if group.training else 1) * len(measurement.systems)
    warming = one if group.batch <= WHOLE else 0.0
    return warming + max(measurement.seconds, measurement.least * one) + 60 * ("compiled" in measurement.systems)


def runs_here(system: str, machine: Machine) -> bool:
    return SYSTEMS[system].why_not(machine.device, training=True) is None


def _comparison(group: Group, machine: Machine, folder: Path, only: str) -> Callable[[Report, Advance], None]:
    def run(report: Report, advance: Advance) -> None:
        comparison = Comparison(group, make_model(group.tower), machine, folder, only)
        try:
            report.tables.extend(comparison.table(one, advance) for one in group.measurements)
        finally:
            comparison.close()

    return run


def _memory(
    group: Group, measurement: Measurement, machine: Machine, systems: list[str]
) -> Callable[[Report, Advance], None]:
    def run(report: Report, advance: Advance) -> None:
        for system in systems:
            report.memory.append(measure_apart(system, group.workload(measurement), machine))
            advance(1 / len(systems))

    return run


def _gains(machine: Machine, folder: Path, seconds: float) -> Callable[[Report, Advance], None]:
    def run(report: Report, advance: Advance) -> None:
        report.steps = measure_steps(TOWER, 32, machine, folder, seconds, advance)

    return run


def _curve(measure: Callable[[Advance], Curve]) -> Callable[[Report, Advance], None]:
    return lambda report, advance: report.curves.append(measure(advance))


def _parts(machine: Machine, seconds: float) -> Callable[[Report, Advance], None]:
    return lambda report, advance: report.parts.extend(measure_parts(machine.device, seconds))


def _pipeline(seconds: float) -> Callable[[Report, Advance], None]:
    def run(report: Report, advance: Advance) -> None:
        report.pipeline = scale.pipeline(make_model(TOWER), report.tables, seconds)

    return run


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def load() -> float | None:
    """Runnable processes of the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_record(before: float | None) -> dict[str, Any]:
    """The output of `cmaclip env`, the peers' versions, and the machine's load before and after."""
    everything = env.as_dict()
    kept = {name: everything[name] for name in ("platform", "python", "packages", "processor", "gpus", "extension")}
    kept["packages"] = {**kept["packages"], **{name: version(name) for name in PACKAGES}}
    kept["instructions"] = torch.backends.cpu.get_cpu_capability()
    return kept | {"load": {"before": before, "after": load()}}
