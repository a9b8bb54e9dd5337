"""What each step from the plain implementation to ours gains: predicted from the operations, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmaclip_fast.bench import flops
from cmaclip_fast.bench.comparison import Comparison, Group, Machine, Measurement
from cmaclip_fast.bench.results import Step, Steps, Table
from cmaclip_fast.bench.workloads import Texts, make_batches, make_model

STEPS = ("plain", "longest", "packed-text", "packed-fusion", "short-last", "ours")
NAMES = {"longest": "texts padded to the longest, not to 77", "ours": "weights laid out once"}


def operations(shape: flops.Shape, lengths: Sequence[int], context: int) -> dict[str, float]:
    """Of a batch with texts of `lengths` tokens, for each of `STEPS`."""
    rows, longest = len(lengths), max(lengths)
    text = shape.text_layers * (
        rows * flops.layer(longest, longest, longest**2, shape.text_width, shape.text_mlp)
        - sum(flops.layer(n, n, n * (n + 1) / 2, shape.text_width, shape.text_mlp) for n in lengths)
    )
    needed = flops.useful(shape, lengths)
    last = 0.0
    for length in lengths:
        tokens = length + shape.patches + 1
        last += flops.layer(tokens, tokens, tokens**2, shape.width, shape.mlp)
        last -= flops.layer(2, tokens, 2 * tokens, shape.width, shape.mlp)
    to_longest = flops.padded(shape, rows, longest)
    return {
        "plain": flops.padded(shape, rows, context),
        "longest": to_longest,
        "packed-text": to_longest - text,
        "packed-fusion": needed + last,
        "short-last": needed,
        "ours": needed,
    }


def measure_steps(
    tower: str, batch: int, machine: Machine, folder: Path, seconds: float, advance: Callable[[float], Any]
) -> Steps:
    """Inference on product titles, all steps in turn."""
    group = Group(tower, batch, False, (Measurement(Texts.product, STEPS, seconds),))
    model = make_model(tower)
    comparison = Comparison(group, model, machine, folder)
    try:
        table = comparison.table(group.measurements[0], advance)
    finally:
        comparison.close()
    shape = flops.Shape.of(model)
    counts: dict[str, float] = dict.fromkeys(STEPS, 0.0)
    pairs = 0
    for one in make_batches(model, group.workload(group.measurements[0])):
        found = operations(shape, one.text_lengths.tolist(), model.tokenizer.context_length)
        counts = {name: counts[name] + found[name] for name in STEPS}
        pairs += len(one)
    return Steps(table.workload, summary(table, counts, pairs))


def summary(table: Table, counts: dict[str, float], pairs: int) -> list[Step]:
    """The steps in order, each against the one before; the first is the plain implementation."""
    steps = []
    before = STEPS[0]
    for name in STEPS:
        row, last = table.row(name), table.row(before)
        assert row is not None and last is not None
        gained = last.milliseconds.median / row.milliseconds.median
        predicted = counts[before] / counts[name]
        steps.append(Step(NAMES.get(name, row.title), counts[name] / pairs / 1e9, predicted, gained, row.speedup))
        before = name
    return steps
