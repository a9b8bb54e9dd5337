"""How cost grows: with the batch, the text, the tasks and the classes; and what feeds the model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cmaclip_fast.bench import flops
from cmaclip_fast.bench.comparison import Machine, mode, to_device
from cmaclip_fast.bench.peers import SYSTEMS, Setting, System
from cmaclip_fast.bench.results import Curve, Pipeline, Table
from cmaclip_fast.bench.timing import alternate
from cmaclip_fast.bench.workloads import SMALL, Texts, make_batch, make_model, text_lengths
from cmaclip_fast.data.examples import Examples, make_loader
from cmaclip_fast.data.table import read_table
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

COMPARED = ("ours", "longest")
H100_BF16 = 989.4e12
"""Operations a second of an H100 SXM on dense bf16 matrices, from NVIDIA's data sheet."""
UTILISATION = 0.4
"""Assumed share of it that a model of this size reaches."""

Advance = Callable[[float], Any]


def curve(
    title: str,
    axis: str,
    values: Sequence[int],
    point: Callable[[int], tuple[CMACLIP, Batch]],
    machine: Machine,
    seconds: float,
    training: bool = False,
    advance: Advance = lambda share: None,
) -> Curve:
    """Times `COMPARED` at each value; with `training` the loss and its gradients too.

    Args:
        point: the model and the batch at a value.
        seconds: of each point, at least two rounds.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in COMPARED}
    batches = []
    for value in values:
        model, batch = point(value)
        model = model.to(machine.device, torch.float32 if training else machine.dtype).train(training)
        batch = to_device(batch, machine, training)
        setting = Setting(model, len(batch), training, machine.threads, machine.device, machine.dtype, Path())
        systems = {name: SYSTEMS[name](setting) for name in COMPARED}
        runs = {name: _run(system, batch, machine, training) for name, system in systems.items()}
        alternate(runs, 0, least=1, most=1, device=machine.device)
        times = alternate(runs, seconds, least=2, device=machine.device)
        for name in COMPARED:
            milliseconds[name].append(statistics.median(times[name]) * 1e3)
        batches.append(len(batch))
        advance(1 / len(values))
    exponent = {name: growth(values, taken) for name, taken in milliseconds.items()}
    titles = {name: SYSTEMS[name].title for name in COMPARED}
    return Curve(
        title,
        axis,
        list(values),
        batches,
        {titles[name]: taken for name, taken in milliseconds.items()},
        {titles[name]: slope for name, slope in exponent.items()},
    )


def _run(system: System, batch: Batch, machine: Machine, training: bool) -> Callable[[int], None]:
    def run(number: int) -> None:
        with mode(machine, training):
            found = system.loss(batch) if training else system.logits(batch)
        if training:
            assert isinstance(found, torch.Tensor) and system.module is not None
            found.backward()  # type: ignore[no-untyped-call]
            system.module.zero_grad()

    return run


def growth(values: Sequence[float], times: Sequence[float]) -> float:
    """The exponent between the two largest values: 1 where twice the value takes twice the time."""
    return math.log(times[-1] / times[-2]) / math.log(values[-1] / values[-2])


def with_batch(tower: str, sizes: Sequence[int], machine: Machine, seconds: float, advance: Advance) -> Curve:
    model = make_model(tower)

    def point(size: int) -> tuple[CMACLIP, Batch]:
        return model, make_batch(model, text_lengths(Texts.product, size, model))

    title = f"{tower}, inference, product titles"
    return curve(title, "pairs in a batch", sizes, point, machine, seconds, advance=advance)


def with_text(tower: str, lengths: Sequence[int], machine: Machine, seconds: float, advance: Advance) -> Curve:
    model, pairs = make_model(tower), 8

    def point(length: int) -> tuple[CMACLIP, Batch]:
        return model, make_batch(model, [length] * pairs)

    title = f"{tower}, inference, {pairs} pairs with texts of one length"
    return curve(title, "tokens of a text", lengths, point, machine, seconds, advance=advance)


def with_tasks(counts: Sequence[int], machine: Machine, seconds: float, advance: Advance) -> Curve:
    def point(tasks: int) -> tuple[CMACLIP, Batch]:
        model = make_model(SMALL, {f"task {i}": 10 for i in range(tasks)}, depth=2, head_hidden=64)
        return model, make_batch(model, text_lengths(Texts.product, 32, model))

    title = "small towers, loss and gradients, 32 pairs, tasks of 10 classes, heads of width 64"
    return curve(title, "tasks", counts, point, machine, seconds, training=True, advance=advance)


def with_classes(counts: Sequence[int], machine: Machine, seconds: float, advance: Advance) -> Curve:
    def point(classes: int) -> tuple[CMACLIP, Batch]:
        model = make_model(SMALL, {"task": classes}, depth=2)
        return model, make_batch(model, text_lengths(Texts.product, 32, model))

    title = "small towers, loss and gradients, 32 pairs, one task"
    return curve(title, "classes", counts, point, machine, seconds, training=True, advance=advance)


def loader_rate(model: CMACLIP, seconds: float, batch: int = 32) -> float:
    """Pictures a second of one loader process: read, decoded, made square, normalised; on one core."""
    table = read_table("openclipart")
    classes = {task: sorted({name for name in table.labels(task) if name}) for task in table.columns.tasks}
    examples = Examples(table, classes, model.preprocessing, model.tokenizer, cache_images=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loader = iter(make_loader(examples, batch, shuffle=True, drop_last=True))
        next(loader)
        begin = time.perf_counter()
        count = 0
        for _ in loader:
            count += batch
            if time.perf_counter() - begin > seconds:
                break
        return count / (time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)


def pipeline(model: CMACLIP, tables: Sequence[Table], seconds: float) -> Pipeline:
    """The loader's rate against that of our model: as it was measured in `tables`, and as calculated for an H100."""
    loader = loader_rate(model, seconds)
    rates: dict[str, float] = {}
    for table in tables:
        row = table.row("ours")
        if row is not None and table.batch == 32 and table.texts == Texts.product.value:
            rates[f"this machine, {table.workload}"] = row.pairs_per_second
    shape = flops.Shape.of(model)
    lengths = text_lengths(Texts.product, 256, model)
    forward = flops.useful(shape, lengths)
    for use, operations in (
        ("inference", forward),
        ("training", flops.training(shape, len(lengths), forward)),
    ):
        rates[f"H100, calculated, {use}"] = H100_BF16 * UTILISATION / (operations / len(lengths))
    assumed = (
        f"H100 SXM, {H100_BF16 / 1e12:.1f} TFLOP/s on dense bf16 matrices (NVIDIA's data sheet), of which"
        f" {UTILISATION:.0%} are taken to be reached; {forward / len(lengths) / 1e9:.2f} GFLOP a pair forward"
        f" ({model.config.name}, product titles); loader processes as fast as this machine's"
    )
    return Pipeline(loader, rates, {name: math.ceil(rate / loader) for name, rate in rates.items()}, assumed)
